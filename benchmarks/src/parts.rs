//! What is measured, one part a file.

mod allocations;
mod blocked;
mod drain;
mod flat_out;
mod idle;
mod live;
pub(crate) mod memory;
mod relays;
mod round_trip;
mod shapes;
mod statements;
mod write_path;

use std::{future::Future, pin::Pin};

use anyhow::Result;

use crate::{lab::Lab, report::Page};

/// One part of a run.
pub(crate) struct Part {
    pub(crate) name: &'static str,
    pub(crate) run: for<'a> fn(&'a Lab) -> Running<'a>,
}

type Running<'a> = Pin<Box<dyn Future<Output = Result<Page>> + 'a>>;

/// The part that needs a build of its own.
pub(crate) const ALLOCATIONS: &str = "allocations";

/// All of them, in the order in which they run.
pub(crate) const PARTS: &[Part] = &[
    Part { name: "drain", run: |lab| Box::pin(drain::run(lab)) },
    Part { name: "statements", run: |lab| Box::pin(statements::run(lab)) },
    Part { name: "live", run: |lab| Box::pin(live::run(lab)) },
    Part { name: "flat-out", run: |lab| Box::pin(flat_out::run(lab)) },
    Part { name: "idle", run: |lab| Box::pin(idle::run(lab)) },
    Part { name: "write-path", run: |lab| Box::pin(write_path::run(lab)) },
    Part { name: "round-trip", run: |lab| Box::pin(round_trip::run(lab)) },
    Part { name: "blocked-key", run: |lab| Box::pin(blocked::key(lab)) },
    Part { name: "blocked-purge", run: |lab| Box::pin(blocked::purge(lab)) },
    Part { name: "relays", run: |lab| Box::pin(relays::run(lab)) },
    Part { name: "lanes", run: |lab| Box::pin(shapes::lanes(lab)) },
    Part { name: "windows", run: |lab| Box::pin(shapes::windows(lab)) },
    Part { name: "payloads", run: |lab| Box::pin(shapes::payloads(lab)) },
    Part { name: "memory", run: |lab| Box::pin(memory::run(lab)) },
    Part { name: "retained", run: |lab| Box::pin(blocked::archive(lab)) },
    Part { name: ALLOCATIONS, run: |lab| Box::pin(allocations::run(lab)) },
];
