#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod error;
mod headers;
mod inbox;
mod insert;
#[cfg(test)]
mod properties;
mod schema;
mod store;
mod tables;
mod text;
mod writer;

pub use sqlx;

pub use crate::inbox::MySqlInbox;
pub use crate::insert::{MySqlInsert, SqlValue};
pub use crate::schema::MySqlSchema;
pub use crate::store::MySqlStore;
pub use crate::writer::{MySqlOutbox, MySqlWriter};
