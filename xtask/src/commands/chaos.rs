//! `cargo xtask chaos`: real servers, writers and relays under seeded faults.

use anyhow::Result;

use super::Command;
use crate::cargo::{cargo, run, target};

pub(super) const COMMAND: Command = Command {
    name: "chaos",
    usage: "chaos [--for 60s] [--seed N]",
    about: "real servers under seeded faults [--engine mysql] [--rate N] [--report docs/chaos]",
    run: chaos,
};

fn chaos(arguments: &[String]) -> Result<()> {
    // Optimised, so that the servers have the processors and not the writers.
    let mut chaos = cargo(&["run", "--quiet", "--release", "--package", "chaos", "--", "--keep"]);
    if arguments.iter().any(|argument| argument == "--bug") {
        chaos.env("RUSTFLAGS", "--cfg outbox_seeded_bug");
        chaos.env("CARGO_TARGET_DIR", target().join("seeded"));
    }
    run(chaos.arg(target().join("chaos")).args(arguments))
}
