//! The broker against librdkafka's simulated cluster: no server is needed.

mod building;
mod cluster;
mod conformance;
mod failing;
mod publishing;
mod silent_partition;
