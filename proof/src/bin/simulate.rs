//! `cargo xtask simulate`: the shipped machine under seeded faults, as many seeds as wanted.

use std::process::ExitCode;
use std::time::Instant;

use outbox_testing::simulation::trace;
use proof::{Arguments, count, sweep};

/// As many as a test run has.
const SEEDS: u64 = 20_000;

fn main() -> ExitCode {
    match simulate() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(text) => {
            eprintln!("simulate: {text}");
            ExitCode::FAILURE
        }
    }
}

/// Tells whether every seed kept the promises.
fn simulate() -> Result<bool, String> {
    let arguments = Arguments::of_process(&["seeds", "from"])?;
    let (seeds, from) = (arguments.or("seeds", SEEDS)?, arguments.or("from", 0)?);
    let began = Instant::now();
    // The text of a panic is part of what its seed is reported with.
    std::panic::set_hook(Box::new(|_| {}));
    let outcome = sweep(from, seeds);
    let _ = std::panic::take_hook();
    let took = began.elapsed().as_secs_f64();
    match outcome {
        Ok(sum) => {
            println!(
                "simulate: {} seeds from {from} in {took:.1} s: {} committed, {} appearances \
                 ({} repeated, all within the bound), {} faults, {} simulated hours; 0 violations",
                count(sum.seeds),
                count(sum.committed),
                count(sum.appearances),
                count(sum.repeated),
                count(sum.faults),
                count(sum.simulated.as_secs() / 3_600),
            );
            Ok(true)
        }
        Err(failure) => {
            let seed = failure.seed;
            println!("{}", trace_of(seed));
            for violation in &failure.violations {
                println!("VIOLATION {violation}");
            }
            println!("replay: cargo xtask simulate --seeds 1 --from {seed}");
            println!("simulate: FAILED at seed {seed} after {took:.1} s");
            Ok(false)
        }
    }
}

/// What happened under this seed, line by line, as far as the run comes.
fn trace_of(seed: u64) -> String {
    let run = std::panic::catch_unwind(|| trace(seed).trace.join("\n"));
    run.unwrap_or_else(|_| "the run ends with a panic, before its trace".into())
}
