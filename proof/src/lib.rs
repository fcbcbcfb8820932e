//! What the commands share: many seeds on all cores, and figures people can read.

mod arguments;
mod seeds;

pub use self::arguments::{Arguments, count};
pub use self::seeds::{Failure, Totals, first_failure, run_seed, sweep};
