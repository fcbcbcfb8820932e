//! The lowest rung: servers on loopback that this crate fetches and starts itself.
//!
//! No daemon and no image registry is needed: MySQL and MariaDB come from Debian packages that are
//! unpacked into a cache folder (nothing is installed on the machine), Apache Kafka from Maven
//! Central. Servers run without privileges, also when the tests run as root.

mod account;
mod cache;
pub(crate) mod client;
mod debian;
mod folder;
pub(crate) mod kafka;
mod maven;
pub(crate) mod ports;
mod server;
pub(crate) mod sql;
pub(crate) mod tool;

pub use server::Server;
