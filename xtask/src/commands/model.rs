//! `cargo xtask model`: every order of events of small systems that run the shipped machine.

use anyhow::Result;

use super::Command;
use crate::cargo::{cargo, run, target};

pub(super) const COMMAND: Command = Command {
    name: "model",
    usage: "model [--only NAME] [--bug BUG]",
    about: "every order of events of small systems; --bug shows that it can fail",
    run: model,
};

fn model(arguments: &[String]) -> Result<()> {
    let program = ["run", "--quiet", "--package", "proof", "--bin", "model", "--"];
    let mut model = cargo(&program);
    if arguments.iter().any(|argument| argument == "--bug") {
        model.env("RUSTFLAGS", "--cfg outbox_seeded_bug");
        model.env("CARGO_TARGET_DIR", target().join("seeded"));
    }
    run(model.args(arguments))
}
