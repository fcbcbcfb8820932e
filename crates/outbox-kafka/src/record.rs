//! A message as a Kafka record.

use outbox_core::broker::Outgoing;
use outbox_core::message::header;
use rdkafka::message::{Header, Message as _, OwnedHeaders, OwnedMessage};
use rdkafka::producer::BaseRecord;
use uuid::Uuid;
use uuid::fmt::Hyphenated;

use crate::batch::Ticket;

/// The record of a message: topic, key and payload byte for byte, null where they are absent, the
/// partition if there is a choice of one, our headers and then the user's in their order. It has no
/// timestamp of its own, so librdkafka sets the time of the publish.
pub(crate) fn of(
    outgoing: &Outgoing,
    partition: Option<i32>,
    ticket: Box<Ticket>,
) -> BaseRecord<'_, [u8], [u8], Box<Ticket>> {
    let message = &outgoing.delivery.message;
    BaseRecord {
        topic: message.topic(),
        partition,
        payload: message.payload(),
        key: message.key(),
        timestamp: None,
        headers: Some(headers(outgoing)),
        delivery_opaque: ticket,
    }
}

/// The record of a message that was refused: as it was, to the partition that it was for.
pub(crate) fn again(
    message: &OwnedMessage,
    ticket: Box<Ticket>,
) -> BaseRecord<'_, [u8], [u8], Box<Ticket>> {
    BaseRecord {
        topic: message.topic(),
        partition: Some(message.partition()),
        payload: message.payload(),
        key: message.key(),
        timestamp: None,
        headers: message.headers().cloned(),
        delivery_opaque: ticket,
    }
}

fn headers(outgoing: &Outgoing) -> OwnedHeaders {
    let message = &outgoing.delivery.message;
    let mut id = [0; Hyphenated::LENGTH];
    let id: &str = Uuid::from(message.id()).hyphenated().encode_lower(&mut id);
    let mut headers = OwnedHeaders::new_with_capacity(message.headers().len() + 2)
        .insert(Header { key: header::ID, value: Some(id) });
    if outgoing.delivery.state.retried {
        headers = headers.insert(Header { key: header::RETRIED, value: Some("true") });
    }
    for (key, value) in message.headers().iter() {
        headers = headers.insert(Header { key, value });
    }
    headers
}
