//! One named test for every promise that a store or a broker makes, for those we ship and for
//! your own.
//!
//! You write a fixture, which sets up what is under test and looks at it from outside, and hand it
//! to a macro. Each case becomes a test of its own, named after the line of the contract that it
//! checks:
//!
//! ```text
//! test answering::an_overdue_message_is_never_sent ... ok
//! test recording::a_tombstone_is_no_empty_payload ... FAILED
//! ```
//!
//! A case runs on a runtime of its own, with one thread, and sets up a fixture of its own. What a
//! store or a broker does not have, its fixture says: such cases pass at once, and their
//! documentation tells so.
//!
//! | suite | given | for |
//! |---|---|---|
//! | [`broker_conformance!`](crate::broker_conformance) | [`BrokerFixture`](broker::BrokerFixture) | [`Broker`](outbox_core::Broker) |
//! | [`store_conformance!`](crate::store_conformance) | [`StoreFixture`](store::StoreFixture) | [`Store`](outbox_core::Store) and [`Writer`](outbox_core::Writer) |
//! | [`dead_letters_conformance!`](crate::dead_letters_conformance) | [`DeadLettersFixture`](store::DeadLettersFixture) | [`DeadLetters`](outbox_core::DeadLetters) |
//!
//! # A broker
//!
//! This is a whole file, such as `tests/conformance.rs`, of a package with `outbox-core`,
//! `outbox-testing` and tokio. The broker appends to a log in memory; yours sends to a server. What
//! it has to get right is in its comments.
//!
//! ```
//! use std::sync::{Arc, Mutex};
//! use std::time::Duration;
//!
//! use outbox_core::broker::{
//!     BrokerProfile, Outcomes, Outgoing, PublishError, PublishErrorKind,
//! };
//! use outbox_core::delivery::Receipt;
//! use outbox_core::message::header;
//! use outbox_core::{Broker, MessageId, async_trait};
//! use outbox_testing::Published;
//! use outbox_testing::conformance::broker::BrokerFixture;
//!
//! #[derive(Debug, Clone, Default)]
//! struct Log(Arc<Mutex<Vec<Published>>>);
//!
//! #[async_trait]
//! impl Broker for Log {
//!     fn profile(&self) -> BrokerProfile {
//!         BrokerProfile::new(1_000_000, Duration::from_secs(5))
//!     }
//!
//!     // In the order of the batch: then the messages of each key are in theirs.
//!     async fn publish(&self, batch: Vec<Outgoing>, outcomes: &Outcomes) {
//!         for (index, outgoing) in batch.into_iter().enumerate() {
//!             // Right before each message, not once for the batch.
//!             if outgoing.is_overdue() {
//!                 outcomes.failed(index, PublishErrorKind::NotSent.into());
//!                 continue;
//!             }
//!             match self.send(&outgoing) {
//!                 // As soon as it is known: answers count even if this call is then dropped.
//!                 Ok(receipt) => outcomes.delivered(index, receipt),
//!                 Err(kind) => outcomes.failed(index, kind.into()),
//!             }
//!         }
//!     }
//!
//!     async fn check(&self) -> Result<(), PublishError> {
//!         Ok(()) // A round trip to the server.
//!     }
//!
//!     async fn close(&self, _within: Duration) {} // Nothing is queued here.
//! }
//!
//! impl Log {
//!     fn send(&self, outgoing: &Outgoing) -> Result<Receipt, PublishErrorKind> {
//!         let (message, state) = (&outgoing.delivery.message, &outgoing.delivery.state);
//!         // The kind decides whether an attempt is counted, and who waits. When it is not known
//!         // whether the message arrived, as after a timeout, it is `Unknown`.
//!         match message.topic() {
//!             _ if message.size() > self.profile().max_message_bytes => {
//!                 return Err(PublishErrorKind::Rejected);
//!             }
//!             "unknown" => return Err(PublishErrorKind::Destination),
//!             _ => {}
//!         }
//!         // These two headers are the broker's to add.
//!         let mut headers = vec![(header::ID.into(), Some(message.id().to_string().into()))];
//!         if state.retried {
//!             headers.push((header::RETRIED.into(), Some("true".into())));
//!         }
//!         // Null and empty are not the same, in keys, payloads and headers.
//!         let bytes = |bytes: Option<&[u8]>| bytes.map(<[u8]>::to_vec);
//!         let own = message.headers().iter();
//!         headers.extend(own.map(|(name, value)| (name.to_owned(), bytes(value))));
//!         let (key, payload) = (bytes(message.key()), bytes(message.payload()));
//!         let mut log = self.0.lock().unwrap();
//!         let place = (0, log.len() as i64);
//!         log.push(Published::new(message.topic(), place, key, payload, headers));
//!         Ok(Receipt::new(Some(place.0), Some(place.1)))
//!     }
//! }
//!
//! struct Fixture(Log);
//!
//! #[async_trait]
//! impl BrokerFixture for Fixture {
//!     async fn set_up() -> Self {
//!         Self(Log::default())
//!     }
//!     fn broker(&self) -> Arc<dyn Broker> {
//!         Arc::new(self.0.clone())
//!     }
//!     async fn create_topic(&self) -> String {
//!         format!("topic-{}", MessageId::generate()) // On a server: create it.
//!     }
//!     fn unknown_topic(&self) -> Option<String> {
//!         Some("unknown".to_owned()) // `None` if every topic exists.
//!     }
//!     async fn published_to(&self, topic: &str) -> Vec<Published> {
//!         // On a server: with a consumer, from the beginning to the end.
//!         self.0.0.lock().unwrap().iter().filter(|it| it.topic == topic).cloned().collect()
//!     }
//! }
//!
//! outbox_testing::broker_conformance!(Fixture);
//! # fn main() {
//! #     use outbox_testing::conformance::{broker::{answering, recording}, run};
//! #     run(answering::each_message_is_answered_and_has_arrived::<Fixture>());
//! #     run(answering::an_overdue_message_is_never_sent::<Fixture>());
//! #     run(answering::an_unknown_topic_counts_no_attempt::<Fixture>());
//! #     run(answering::a_message_that_is_too_large_is_rejected_alone::<Fixture>());
//! #     run(recording::a_message_arrives_byte_for_byte::<Fixture>());
//! #     run(recording::a_retried_dead_letter_is_marked::<Fixture>());
//! #     run(recording::a_tombstone_is_no_empty_payload::<Fixture>());
//! #     run(recording::messages_of_a_key_arrive_in_order::<Fixture>());
//! # }
//! ```
//!
//! The suite cannot make your server fail. Test the mapping of its errors to
//! [`PublishErrorKind`](outbox_core::broker::PublishErrorKind) yourself, timeouts above all. The
//! example `custom_broker` does so for HTTP.
//!
//! # A store
//!
//! The fixture of a store begins, commits and rolls back as an application does. The example
//! `custom_store` is a whole store on a key-value engine. [`LeaseTable`](outbox_core::LeaseTable)
//! has the rules of leasing, [`Message::encode`](outbox_core::Message::encode) makes bytes of a
//! message.
//!
//! ```
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use outbox_core::{Message, MessageId, Outbox, Store, async_trait};
//! use outbox_testing::conformance::store::StoreFixture;
//! use outbox_testing::{MemoryConnection, MemoryStore, MemoryTransaction, MemoryWriter};
//!
//! struct Fixture(MemoryStore);
//!
//! #[async_trait]
//! impl StoreFixture for Fixture {
//!     type Writer = MemoryWriter;
//!     type Transaction = MemoryTransaction<'static>;
//!     type Connection = Box<MemoryConnection>;
//!
//!     async fn set_up() -> Self {
//!         tokio::time::pause();
//!         Self(MemoryStore::new())
//!     }
//!     fn writer(&self) -> MemoryWriter {
//!         MemoryWriter::new()
//!     }
//!     fn store(&self) -> Arc<dyn Store> {
//!         Arc::new(self.0.clone())
//!     }
//!     fn sees_open_rows(&self) -> bool {
//!         true
//!     }
//!     async fn begin(&self) -> MemoryTransaction<'static> {
//!         self.0.begin()
//!     }
//!     async fn commit(&self, transaction: MemoryTransaction<'static>) {
//!         transaction.commit();
//!     }
//!     async fn roll_back(&self, transaction: MemoryTransaction<'static>) {
//!         transaction.rollback();
//!     }
//!     async fn add_in_savepoint(
//!         &self,
//!         transaction: &mut MemoryTransaction<'static>,
//!         message: Message,
//!         release: bool,
//!     ) -> bool {
//!         let mut savepoint = transaction.begin();
//!         Outbox::new(self.writer()).add(&mut savepoint, message).await.unwrap();
//!         if release { savepoint.commit() } else { savepoint.rollback() }
//!         true
//!     }
//!     async fn connect(&self) -> Option<Box<MemoryConnection>> {
//!         Some(Box::new(self.0.connection()))
//!     }
//!     async fn garble(&self, message: MessageId) -> bool {
//!         self.0.garble(message)
//!     }
//!     async fn pass(&self, time: Duration) {
//!         tokio::time::advance(time).await; // Against a real server: sleep.
//!     }
//!     async fn set_clock_back(&self, time: Duration) -> bool {
//!         self.0.set_clock_back(time); // Against a real server: change what it has stored.
//!         true
//!     }
//! }
//!
//! outbox_testing::store_conformance!(Fixture);
//! # fn main() {}
//! ```

pub mod broker;
pub mod store;

use std::future::Future;

/// Runs one case on a runtime of its own, as the macros do.
pub fn run(case: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(case);
}

/// Emits one test per case of a group.
#[doc(hidden)]
#[macro_export]
macro_rules! __conformance {
    ($fixture:ty, $suite:ident :: $group:ident { $($case:ident,)* }) => {
        mod $group {
            #[allow(unused_imports)]
            use super::*;

            $(
                #[test]
                fn $case() {
                    $crate::conformance::run(
                        $crate::conformance::$suite::$group::$case::<$fixture>(),
                    );
                }
            )*
        }
    };
}
