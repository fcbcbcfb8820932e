//! The end-to-end tests, in one program: they share the servers that it starts.

mod end_to_end;
mod examples;
mod faithful;
mod faults;
mod kafka;
mod kafka_conformance;
mod mysql;
mod provisioning;
mod scenario;
mod sqlite;
mod tls;
