#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod error;
mod headers;
mod inbox;
mod insert;
mod schema;
mod store;
mod tables;
mod text;
mod writer;

pub use sqlx;

pub use crate::inbox::SqliteInbox;
pub use crate::insert::{SqlValue, SqliteInsert};
pub use crate::schema::SqliteSchema;
pub use crate::store::SqliteStore;
pub use crate::writer::{SqliteOutbox, SqliteWriter};
