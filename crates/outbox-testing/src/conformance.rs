//! One named test for every promise that a store or a broker makes, for those we ship and for
//! your own.
//!
//! Write a fixture and hand it to the macro; each case becomes a test of its own:
//!
//! ```
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use outbox_core::{MessageId, Store, async_trait};
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
//!     async fn connect(&self) -> Box<MemoryConnection> {
//!         Box::new(self.0.connection())
//!     }
//!     async fn garble(&self, message: MessageId) -> bool {
//!         self.0.garble(message)
//!     }
//!     async fn pass(&self, time: Duration) {
//!         tokio::time::advance(time).await; // Against a real server: sleep.
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
