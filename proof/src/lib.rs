//! What the commands share: many seeds on all cores, the model, and figures people can read.

mod arguments;
mod model;
mod seeds;

pub use self::arguments::{Arguments, count};
pub use self::model::{Setup, Step};
pub use self::seeds::{Failure, Totals, first_failure, run_seed, sweep};
