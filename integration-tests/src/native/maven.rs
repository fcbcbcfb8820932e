//! Apache Kafka's jars, from Maven Central as Maven of this machine is set up.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result};

use super::{cache::Cache, tool};
use crate::report;

const POM: &str = include_str!("pom.xml");
/// How the broker logs, beside its jars.
pub(super) const LOG4J: &str = "log4j2.properties";
const COPY: &str = "org.apache.maven.plugins:maven-dependency-plugin:3.7.1:copy-dependencies";

/// The folder with the broker and all it needs; named after the pom, so that a new version of
/// Kafka there is fetched.
pub(super) fn kafka_jars(cache: &Cache) -> Result<PathBuf> {
    cache.once(
        &format!("kafka-{}", version().context("the version of Kafka in pom.xml")?),
        |jars| {
            tool::require("mvn", "maven")?;
            report::line("fetching Apache Kafka from Maven Central");
            fs::write(jars.join(LOG4J), include_str!("log4j2.properties"))?;
            let pom = jars.join("pom.xml");
            fs::write(&pom, POM)?;
            tool::run(
                Command::new("mvn")
                    .args(["-q", "-B", "-f"])
                    .arg(&pom)
                    .arg(format!("-DoutputDirectory={}", jars.display()))
                    .args(["-DincludeScope=runtime", COPY]),
            )?;
            Ok(())
        },
    )
}

fn version() -> Option<&'static str> {
    let broker = POM.split_once("<artifactId>kafka_2.13</artifactId>")?.1;
    Some(broker.split_once("<version>")?.1.split_once("</version>")?.0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_cache_is_named_after_the_version_in_the_pom() {
        assert!(super::version().is_some_and(|version| version.starts_with("4.")));
    }
}
