//! Many seeds of the simulation on all cores.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, available_parallelism};
use std::time::{Duration, Instant};

use outbox_testing::simulation::{Report, simulate};

use crate::count;

/// A seed under which a promise was broken.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// What was broken, one a line.
    pub violations: Vec<String>,
}

/// The sums of all runs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Totals {
    /// Seeds that were run.
    pub seeds: u64,
    /// Messages committed.
    pub committed: u64,
    /// Appearances in the logs.
    pub appearances: u64,
    /// Appearances beyond the first of each message.
    pub repeated: u64,
    /// Faults injected.
    pub faults: u64,
    /// Simulated time.
    pub simulated: Duration,
}

impl Totals {
    fn add(&mut self, report: &Report) {
        self.seeds += 1;
        self.committed += report.committed as u64;
        self.appearances += report.appearances as u64;
        self.repeated += report.repeated as u64;
        self.faults += report.faults as u64;
        self.simulated += report.took;
    }
}

/// Runs one seed; a panic of the machine is a violation like any other.
///
/// # Errors
///
/// What was broken.
pub fn run_seed(seed: u64) -> Result<Report, Failure> {
    let broken = |violations| Failure { seed, violations };
    match catch_unwind(AssertUnwindSafe(|| simulate(seed))) {
        Ok(report) if report.violations.is_empty() => Ok(report),
        Ok(report) => Err(broken(report.violations)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Err(broken(vec![format!("panic: {}", text.unwrap_or("without a text"))]))
        }
    }
}

/// The first failing one of `seeds`, on this thread.
pub fn first_failure(mut seeds: std::ops::Range<u64>) -> Option<Failure> {
    seeds.find_map(|seed| run_seed(seed).err())
}

/// Runs `seeds` on all cores until all are run, or one failed; says every few seconds how far it
/// has come.
///
/// # Errors
///
/// The smallest seed that failed, once every smaller one was run as well.
pub fn sweep(from: u64, seeds: u64) -> Result<Totals, Failure> {
    let next = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let finished = AtomicBool::new(false);
    let sum = Mutex::new((Totals::default(), None::<Failure>));
    let work = || {
        // A thread that has taken a seed runs it: so none below a failing one is left out.
        while !failed.load(Ordering::Relaxed) {
            let offset = next.fetch_add(1, Ordering::Relaxed);
            if offset >= seeds {
                break;
            }
            let outcome = run_seed(from.wrapping_add(offset));
            let mut sum = sum.lock().expect("no thread panics while it holds the sum");
            match outcome {
                Ok(report) => sum.0.add(&report),
                Err(failure) => {
                    failed.store(true, Ordering::Relaxed);
                    if sum.1.as_ref().is_none_or(|first| failure.seed < first.seed) {
                        sum.1 = Some(failure);
                    }
                }
            }
        }
    };
    thread::scope(|scope| {
        let threads = available_parallelism().map_or(2, usize::from);
        let runs: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let reporter = scope.spawn(|| report_progress(&next, seeds, &finished));
        for run in runs {
            run.join().expect("panics of a seed are caught");
        }
        finished.store(true, Ordering::Relaxed);
        reporter.thread().unpark();
    });
    match sum.into_inner().expect("all threads have ended") {
        (totals, None) => Ok(totals),
        (_, Some(failure)) => Err(failure),
    }
}

fn report_progress(next: &AtomicU64, seeds: u64, finished: &AtomicBool) {
    let began = Instant::now();
    loop {
        thread::park_timeout(Duration::from_secs(5));
        if finished.load(Ordering::Relaxed) {
            return;
        }
        let done = next.load(Ordering::Relaxed).min(seeds);
        let rate = done as f64 / began.elapsed().as_secs_f64();
        eprintln!("{} of {} seeds, {rate:.0} a second", count(done), count(seeds));
    }
}
