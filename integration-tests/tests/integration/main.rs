//! The end-to-end tests, in one program: they share the servers that it starts.

mod mysql;
mod provisioning;
