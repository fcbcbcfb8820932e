//! The commands, one a file.

mod api;
mod bench;
mod chaos;
mod check;
mod fix;
mod kafka_tls;
mod model;
mod seeded_bugs;
mod servers;
mod simulate;

use anyhow::Result;

/// One command. A new one is a file beside these, and a line in [`COMMANDS`].
pub(crate) struct Command {
    pub(crate) name: &'static str,
    /// With its arguments.
    pub(crate) usage: &'static str,
    /// One line for the list.
    pub(crate) about: &'static str,
    pub(crate) run: fn(&[String]) -> Result<()>,
}

/// All of them, in the order of the list.
pub(crate) const COMMANDS: &[Command] = &[
    check::COMMAND,
    fix::COMMAND,
    api::COMMAND,
    servers::COMMAND,
    simulate::COMMAND,
    seeded_bugs::COMMAND,
    model::COMMAND,
    chaos::COMMAND,
    bench::COMMAND,
    kafka_tls::COMMAND,
];
