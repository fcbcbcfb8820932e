#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod batch;
mod broker;
mod builder;
mod context;
mod error;
mod exposure;
mod partitions;
mod producer;
mod properties;
mod record;
mod secrets;
mod security;
mod timing;
mod verdict;

pub use rdkafka;

pub use crate::broker::KafkaBroker;
pub use crate::builder::{Compression, KafkaBuilder, Partitioner};
pub use crate::error::{KafkaBuildError, KafkaBuildErrorKind};
pub use crate::security::Security;
