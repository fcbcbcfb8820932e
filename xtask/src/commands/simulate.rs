//! `cargo xtask simulate`: as many seeds of the simulation as wanted, on all cores.

use anyhow::Result;

use super::Command;
use crate::cargo::{cargo, run};

pub(super) const COMMAND: Command = Command {
    name: "simulate",
    usage: "simulate [--seeds N] [--from SEED]",
    about: "the shipped machine under seeded faults; one seed alone prints what happened",
    run: simulate,
};

fn simulate(arguments: &[String]) -> Result<()> {
    // The workspace's profiles optimise the machine and the simulation.
    let program = ["run", "--quiet", "--package", "proof", "--bin", "simulate", "--"];
    run(cargo(&program).args(arguments))
}
