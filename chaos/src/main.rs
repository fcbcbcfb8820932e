//! Real servers, writers and relays under seeded faults, and a checker of what came of it.
//!
//! `cargo xtask chaos --for 60s --seed N` builds and runs it. The supervisor starts MariaDB or
//! MySQL, three brokers, writers and relays, each a process; lets faults befall them that the seed
//! decided; and compares what was committed with what appeared. It exits with an error for every
//! violation, and keeps what was written down.

mod bug;
mod check;
mod consumer;
mod entry;
mod fault;
mod history;
mod inject;
mod options;
mod program;
mod report;
mod run;
mod schedule;
mod stage;
mod topic;
mod writer;

use std::{env, process::ExitCode};

use anyhow::Result;

use crate::options::Options;

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let words: Vec<String> = env::args().skip(1).collect();
    match words.first().map(String::as_str) {
        Some("writer") => writer::run().await.map(|()| ExitCode::SUCCESS),
        Some("relay") => {
            env::var(bug::VARIABLE).map_or(Ok(()), |name| bug::choose(&name))?;
            integration_tests::relay::run().await.map(|()| ExitCode::SUCCESS)
        }
        _ => {
            let is_good = run::run(&Options::parse(&words)?).await?;
            Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}
