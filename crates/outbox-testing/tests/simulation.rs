//! The shipped machine under seeded faults.

use outbox_testing::simulation::{simulate, trace};

/// 20,000 seeds within 90 s on two cores.
#[test]
fn no_seed_loses_repeats_invents_or_reorders_a_message() {
    let from = number("OUTBOX_SEED", 0);
    let count = number("OUTBOX_SEEDS", 20_000);
    let threads = std::thread::available_parallelism().map_or(2, usize::from) as u64;
    let totals = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn(move || {
                    let mut sum = (0, 0, 0, 0);
                    for seed in (from + thread..from + count).step_by(threads as usize) {
                        let report = simulate(seed);
                        assert!(
                            report.violations.is_empty(),
                            "{}\nreplay: OUTBOX_SEED={seed} OUTBOX_SEEDS=1 cargo test -p outbox-testing --test simulation",
                            if count == 1 { trace(seed) } else { report }
                        );
                        sum.0 += report.committed;
                        sum.1 += report.appearances;
                        sum.2 += report.repeated;
                        sum.3 += report.faults;
                    }
                    sum
                })
            })
            .collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect::<Vec<_>>()
    });
    let sum = totals.iter().fold((0, 0, 0, 0), |a, b| (a.0 + b.0, a.1 + b.1, a.2 + b.2, a.3 + b.3));
    println!(
        "{count} seeds: {} committed, {} appearances, {} repeated, {} faults",
        sum.0, sum.1, sum.2, sum.3
    );
    // What a seed has of each, at least, when there are many: or the seeds show nothing.
    if count >= 1_000 {
        let count = usize::try_from(count).unwrap();
        assert!(sum.0 > 50 * count && sum.2 > count / 10 && sum.3 > 5 * count, "{sum:?}");
    }
}

fn number(variable: &str, without: u64) -> u64 {
    let Ok(text) = std::env::var(variable) else { return without };
    let number = text.parse().ok().filter(|_| variable == "OUTBOX_SEED" || text != "0");
    number.unwrap_or_else(|| panic!("{variable}: {text:?} is no number of seeds"))
}
