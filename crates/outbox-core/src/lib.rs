#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod broker;
pub mod dead_letters;
pub mod delivery;
mod dispatcher;
mod lease_table;
pub mod machine;
pub mod message;
#[cfg(feature = "metrics")]
#[cfg_attr(docsrs, doc(cfg(feature = "metrics")))]
pub mod metrics;
pub mod observe;
mod outbox;
pub mod retry;
#[cfg(outbox_seeded_bug)]
pub mod seeded;
#[cfg(not(outbox_seeded_bug))]
mod seeded;
pub mod status;
pub mod store;
mod trace;
mod wake;

pub use async_trait::async_trait;

pub use crate::broker::Broker;
pub use crate::dead_letters::DeadLetters;
pub use crate::delivery::{Delivery, Lane, Lease, Position, WorkerId};
pub use crate::dispatcher::{
    BuildError, BuildErrorKind, Dispatcher, DispatcherBuilder, DispatcherHandle, RunError,
    RunErrorKind, Summary,
};
pub use crate::lease_table::LeaseTable;
pub use crate::message::{Message, MessageId};
pub use crate::outbox::{AddError, AddErrorKind, Outbox, Writer};
pub use crate::store::Store;
pub use crate::trace::TraceContext;
pub use crate::wake::{Urgency, Wake};
