//! `cargo xtask seeded-bugs`: every seeded defect of the machine must be caught by the simulation.
//!
//! Prints one line a defect, with tabs, for the command to lay out.

use std::process::ExitCode;

#[cfg(outbox_seeded_bug)]
fn main() -> ExitCode {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread::{available_parallelism, scope};
    use std::time::Instant;

    use outbox_core::seeded::{BUGS, choose};
    use proof::{Arguments, first_failure};

    let read = |arguments: Arguments| {
        Ok((arguments.or("seeds", 20_000)?, arguments.or("bug", String::new())?))
    };
    let (seeds, only) = match Arguments::of_process(&["seeds", "bug"]).and_then(read) {
        Ok(read) => read,
        Err(text) => {
            eprintln!("seeded-bugs: {text}");
            return ExitCode::FAILURE;
        }
    };
    std::panic::set_hook(Box::new(|_| {}));
    let wanted = |bug: &&(&str, &str)| only.is_empty() || bug.0 == only;
    let bugs: Vec<_> = BUGS.iter().filter(wanted).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((bug, about)) = bugs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let began = Instant::now();
            choose(Some(bug));
            let failure = first_failure(0..seeds);
            choose(None);
            let seconds = began.elapsed().as_secs_f64();
            let (seed, violation) = match failure {
                Some(failure) => (failure.seed.to_string(), failure.violations[0].clone()),
                None => ("-".to_owned(), String::new()),
            };
            println!("bug\t{bug}\t{about}\t{seed}\t{seconds:.1}\t{violation}");
        }
    };
    scope(|scope| {
        for _ in 0..available_parallelism().map_or(2, usize::from) {
            scope.spawn(work);
        }
    });
    ExitCode::SUCCESS
}

#[cfg(not(outbox_seeded_bug))]
fn main() -> ExitCode {
    eprintln!("seeded-bugs: this program was built without the defects: cargo xtask seeded-bugs");
    ExitCode::FAILURE
}
