//! The end-to-end tests, in one program: they share the servers that it starts.

mod end_to_end;
mod kafka;
mod kafka_conformance;
mod mysql;
mod provisioning;
mod sqlite;
