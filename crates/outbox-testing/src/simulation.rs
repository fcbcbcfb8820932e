//! Deterministic simulation: the shipped machine against a simulated store, broker and clock.
//!
//! Everything that happens in a run follows from one seed: how long each call takes, which of them
//! lose their request or their answer, when workers crash or stand still, what writers commit and
//! in which order. An oracle watches for lost, ghost, disordered and repeated messages. A failing
//! seed replays.
//!
//! ```
//! let report = outbox_testing::simulation::simulate(7);
//! assert!(report.violations.is_empty(), "{report}");
//! ```

mod conduct;
mod database;
mod log;
mod plan;
mod world;

use std::fmt;
use std::time::Duration;

pub use self::plan::{Mode, Plan};
use self::world::World;

/// What one run showed.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// What must never be: empty in a good run.
    pub violations: Vec<String>,
    /// Messages committed.
    pub committed: usize,
    /// Appearances in the broker's log.
    pub appearances: usize,
    /// Appearances beyond the first of each message.
    pub repeated: usize,
    /// Faults injected: crashes, pauses, outages, lost requests and answers.
    pub faults: usize,
    /// Simulated time.
    pub took: Duration,
    /// What happened, line by line; filled by [`trace`].
    pub trace: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.trace {
            writeln!(f, "{line}")?;
        }
        for violation in &self.violations {
            writeln!(f, "VIOLATION {violation}")?;
        }
        write!(
            f,
            "seed {}: {} committed, {} appearances ({} repeated), {} faults, {:?}",
            self.seed, self.committed, self.appearances, self.repeated, self.faults, self.took
        )
    }
}

/// Runs one seed under the plan that follows from it.
pub fn simulate(seed: u64) -> Report {
    World::new(seed, Plan::of(seed), false).run()
}

/// Runs one seed and records every step.
pub fn trace(seed: u64) -> Report {
    World::new(seed, Plan::of(seed), true).run()
}

/// Runs one seed under a plan of one's own.
pub fn simulate_plan(seed: u64, plan: Plan) -> Report {
    World::new(seed, plan, false).run()
}
