#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod broker;
mod cancel;
pub mod conformance;
mod expected;
mod faulty_store;
pub mod simulation;
mod store;

pub use crate::broker::{Fault, MemoryBroker, Outage, Published};
pub use crate::cancel::drop_after;
pub use crate::expected::{Expected, Found, assert_messages};
pub use crate::faulty_store::{FaultyStore, StoreFault, StoreMethod, StoreOutage};
pub use crate::store::{
    MemoryConnection, MemoryOutbox, MemoryStore, MemoryTransaction, MemoryWriter,
};
