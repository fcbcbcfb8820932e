//! Real servers for the end-to-end tests, and trouble for them.
//!
//! [`servers`] gives each test the shared MySQL, MariaDB and Kafka of this process, from the first
//! rung of a ladder that can be had: a URL in the environment, Docker, or servers that this crate
//! fetches and starts on loopback. The rung is printed, nothing is skipped in silence, and a
//! backend that cannot be had fails its tests. Tests that hurt servers start their own:
//! [`Database::private`](database::Database::private), [`KafkaCluster`](kafka::KafkaCluster). A
//! [`proxy`] hurts connections, and a [`process`] can be killed.
//!
//! All of it ends with the process that started it, however that ends.

pub mod database;
mod docker;
pub mod kafka;
pub mod names;
mod native;
pub mod process;
pub mod proxy;
pub mod relay;
mod report;
pub mod servers;
pub mod tls;
mod watchdog;

pub use native::Server;
