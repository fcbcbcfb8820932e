//! `cargo xtask model`: every order of events of small systems that run the shipped machine.

use std::process::ExitCode;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use proof::{Arguments, Setup, count};
use stateright::{Checker, Expectation, HasDiscoveries, Model};

/// The search of a system ends here, and says that it was cut off.
const MOST_STATES: usize = 300_000;

fn main() -> ExitCode {
    match check() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(text) => {
            eprintln!("model: {text}");
            ExitCode::FAILURE
        }
    }
}

/// Tells whether every property holds in every system.
fn check() -> Result<bool, String> {
    let arguments = Arguments::of_process(&["only", "states", "bug"])?;
    let only = arguments.or("only", String::new())?;
    let most = arguments.or("states", MOST_STATES)?;
    choose_bug(&arguments.or("bug", String::new())?)?;
    let began = Instant::now();
    let (mut systems, mut states, mut broken) = (0, 0, 0);
    for setup in Setup::all() {
        if !setup.name.contains(&only) {
            continue;
        }
        systems += 1;
        let (found, failures) = check_one(setup, most);
        states += found;
        broken += failures;
    }
    let seconds = began.elapsed().as_secs_f64();
    let verdict = if broken == 0 { "all hold".into() } else { format!("{broken} BROKEN") };
    println!(
        "model: {systems} systems, {} states, {verdict}, {seconds:.0} s",
        count(states as u64)
    );
    if systems == 0 {
        return Err(format!("no system is named {only:?}"));
    }
    Ok(broken == 0)
}

/// The states of one system, and how many of its properties are broken.
fn check_one(setup: Setup, most: usize) -> (usize, usize) {
    let name = setup.name;
    let threads = available_parallelism().map_or(2, usize::from);
    let began = Instant::now();
    let checker = setup.checker().threads(threads).target_state_count(2 * most);
    let checker = checker.finish_when(HasDiscoveries::AnyFailures).spawn_bfs();
    let mut said = Instant::now();
    while !checker.is_done() && checker.unique_state_count() < most {
        std::thread::sleep(Duration::from_millis(20));
        if said.elapsed() > Duration::from_secs(5) {
            said = Instant::now();
            eprintln!("{name}: {} states so far", count(checker.unique_state_count() as u64));
        }
    }
    // A search also ends at the first failure.
    let failed = |property: &stateright::Property<Setup>| {
        property.expectation.discovery_is_failure() && checker.discovery(property.name).is_some()
    };
    let complete = checker.is_done() && !checker.model().properties().iter().any(failed);
    let states = checker.unique_state_count();
    println!(
        "{name}: {} states, depth {}, {}, {:.1} s",
        count(states as u64),
        checker.max_depth(),
        if complete { "exhaustive" } else { "BOUNDED" },
        began.elapsed().as_secs_f64()
    );
    let discoveries = checker.discoveries();
    let mut broken = 0;
    for property in checker.model().properties() {
        let found = discoveries.get(property.name);
        let holds = match property.expectation {
            // Where the search was cut off, what it did not reach says nothing.
            Expectation::Sometimes => found.is_some() || !complete,
            Expectation::Always | Expectation::Eventually => found.is_none(),
        };
        let kind = format!("{:?}", property.expectation).to_lowercase();
        println!("  {} {kind}: {}", if holds { "ok    " } else { "BROKEN" }, property.name);
        if holds {
            continue;
        }
        broken += 1;
        if let Some(path) = found {
            for step in path.clone().into_actions() {
                println!("           {step:?}");
            }
        }
    }
    (states, broken)
}

/// Switches a defect on, so that the model shows that it can fail.
#[cfg(outbox_seeded_bug)]
fn choose_bug(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Ok(());
    }
    let bug = outbox_core::seeded::BUGS.iter().find(|(listed, _)| *listed == name);
    let (bug, _) = bug.ok_or_else(|| format!("no defect is named {name:?}"))?;
    outbox_core::seeded::choose_everywhere(bug);
    Ok(())
}

#[cfg(not(outbox_seeded_bug))]
fn choose_bug(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Ok(());
    }
    Err(format!("built without the defects, so without {name:?}"))
}
