//! What is said about orders: the contract between this service and its consumers.

use outbox_core::Message;
use outbox_core::message::MessageError;
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    Placed { order: u64, cents: i64 },
    Cancelled { order: u64, cents: i64 },
}

impl Event {
    /// The key is the order: what is said about one order arrives in the order of its commits.
    pub fn message(&self, topic: &str) -> Result<Message, MessageError> {
        let (Self::Placed { order, .. } | Self::Cancelled { order, .. }) = self;
        Message::builder(topic).key(order.to_string()).json(self).build()
    }
}
