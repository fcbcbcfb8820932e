//! `cargo xtask kafka-tls`: Kafka over TLS, which needs another librdkafka than all other tests.

use anyhow::{Result, bail};

use super::Command;
use crate::cargo::{cargo, run};

pub(super) const COMMAND: Command = Command {
    name: "kafka-tls",
    usage: "kafka-tls [--vendored]",
    about: "tests of Kafka over TLS; with libssl-dev, or with an OpenSSL built from source",
    run: kafka_tls,
};

fn kafka_tls(arguments: &[String]) -> Result<()> {
    let features = match arguments {
        [] => "kafka-tls",
        [one] if one == "--vendored" => "kafka-tls,outbox-kafka/ssl-vendored",
        _ => bail!("usage: cargo xtask {}", COMMAND.usage),
    };
    let tests = ["test", "--package", "integration-tests", "--test", "integration", "--features"];
    run(cargo(&tests).args([features, "tls::kafka", "--", "--nocapture"]))
}
