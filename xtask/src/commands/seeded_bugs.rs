//! `cargo xtask seeded-bugs`: every defect on purpose must be found by something.

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
};

use anyhow::{Context, Result, bail, ensure};

use super::Command;
use crate::cargo::{cargo, target};

pub(super) const COMMAND: Command = Command {
    name: "seeded-bugs",
    usage: "seeded-bugs [--suite S] [--seeds N]",
    about: "each defect on purpose must be found; suites: simulation, conformance, all",
    run: seeded_bugs,
};

/// Seeds within which a defect of the machine must be found.
const BUDGET: u64 = 20_000;

struct Caught {
    bug: String,
    /// The suite, and the seed or the case; none if nothing found it.
    by: Option<String>,
    seconds: String,
}

fn seeded_bugs(arguments: &[String]) -> Result<()> {
    let (mut suite, mut budget) = ("all".to_owned(), BUDGET);
    for pair in arguments.chunks(2) {
        match pair {
            [name, value] if name == "--suite" => suite.clone_from(value),
            [name, value] if name == "--seeds" => budget = value.parse()?,
            _ => bail!("{pair:?} is not understood"),
        }
    }
    let all = suite == "all";
    ensure!(all || SUITES.iter().any(|(name, _)| *name == suite), "no suite is named {suite:?}");
    let mut table = vec![];
    for (_, run) in SUITES.iter().filter(|(name, _)| all || *name == suite) {
        table.extend(run(budget)?);
    }
    print(&table);
    let missed = table.iter().filter(|row| row.by.is_none()).count();
    let found = table.len() - missed;
    println!("seeded-bugs: {found} of {} caught, within {budget} seeds", table.len());
    ensure!(missed == 0, "{missed} defects were not caught");
    ensure!(!table.is_empty(), "no defect was tried");
    Ok(())
}

type Suite = fn(u64) -> Result<Vec<Caught>>;

const SUITES: &[(&str, Suite)] = &[("simulation", simulation), ("conformance", conformance)];

/// Defects of the machine, found by the simulation.
fn simulation(budget: u64) -> Result<Vec<Caught>> {
    let seeds = budget.to_string();
    let program = ["run", "--quiet", "--package", "proof", "--bin", "seeded-bugs", "--"];
    let lines = defective(&[&program[..], &["--seeds", &seeds]].concat())?;
    let row = |fields: &[String]| match fields {
        [bug, _, seed, seconds, violation] => {
            let kind = violation.split(':').next().unwrap_or_default();
            let by = (seed != "-").then(|| format!("simulation, seed {seed}: {kind}"));
            Some(Caught { bug: bug.clone(), by, seconds: seconds.clone() })
        }
        _ => None,
    };
    Ok(lines.iter().filter_map(|fields| row(fields)).collect())
}

/// Defects of a store or a broker, found by a conformance case. The first case of each counts.
fn conformance(_: u64) -> Result<Vec<Caught>> {
    let program = ["test", "--quiet", "--package", "outbox-testing", "--test", "mutants", "--"];
    let lines = defective(&[&program[..], &["--nocapture", "--test-threads=1"]].concat())?;
    let mut rows: Vec<Caught> = vec![];
    for fields in &lines {
        let [bug, case, seconds] = &fields[..] else { continue };
        if rows.iter().all(|row| row.bug != *bug) {
            let by = Some(format!("conformance, {case}"));
            rows.push(Caught { bug: bug.clone(), by, seconds: seconds.clone() });
        }
    }
    Ok(rows)
}

/// Runs cargo with the defects compiled in, in a target folder of their own, and gives the fields
/// of the lines that report one.
fn defective(arguments: &[&str]) -> Result<Vec<Vec<String>>> {
    let mut running = cargo(arguments)
        .env("RUSTFLAGS", "--cfg outbox_seeded_bug")
        .env("CARGO_TARGET_DIR", target().join("seeded"))
        .stdout(Stdio::piped())
        // The panics of the cases that find their defect.
        .stderr(if arguments[0] == "test" { Stdio::null() } else { Stdio::inherit() })
        .spawn()
        .context("could not run cargo")?;
    let mut found = vec![];
    for line in BufReader::new(running.stdout.take().context("stdout is piped")?).lines() {
        let line = line?;
        if let Some(fields) = line.strip_prefix("bug\t") {
            eprintln!("{}", fields.replace('\t', "  "));
            found.push(fields.split('\t').map(str::to_owned).collect());
        }
    }
    let status = running.wait()?;
    ensure!(status.success(), "cargo {} ended with {status}", arguments.join(" "));
    Ok(found)
}

fn print(table: &[Caught]) {
    println!("\n| defect | caught by | seconds |\n| --- | --- | --- |");
    for Caught { bug, by, seconds } in table {
        println!("| {bug} | {} | {seconds} |", by.as_deref().unwrap_or("NOTHING"));
    }
}
