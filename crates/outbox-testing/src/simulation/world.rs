//! Time, chance and everything that happens.

mod agenda;
mod broker;
mod calls;
mod faults;
mod workers;
mod writers;

use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::num::NonZeroU16;
use std::time::Duration;

use outbox_core::machine::{Input, Machine, Time};
use outbox_core::{MessageId, WorkerId};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use self::agenda::Entry;
use super::conduct::Conduct;
use super::database::Database;
use super::log::Log;
use super::{Mode, Plan, Report};

const TOPICS: [&str; 3] = ["orders", "skipping", "late"];
/// The payload of a large message, in bytes, and what its key and framing may add.
const LARGE: usize = 3_000;
const FRAMING: usize = 200;
/// After the storm everything must be delivered within this time: leases, back-offs and probes
/// all end well before.
const CALM_AFTER: Duration = Duration::from_secs(150);
/// The workers start within this time.
const START: Duration = Duration::from_secs(2);

#[derive(Default)]
struct Worker {
    machine: Option<Machine>,
    id: Option<WorkerId>,
    /// Rises when the worker crashes or stops: answers for an earlier life go nowhere.
    life: u64,
    paused: bool,
    inbox: Vec<Input>,
    alarm: u64,
    conduct: Conduct,
    /// When its last message of each (topic, key) reaches the log.
    lines: BTreeMap<(String, Vec<u8>), Time>,
    /// It cannot reach the broker, though others can.
    cut: bool,
}

pub(super) struct World {
    seed: u64,
    plan: Plan,
    random: SmallRng,
    now: Time,
    order: u64,
    future: BinaryHeap<Entry>,
    database: Database,
    log: Log,
    workers: Vec<Worker>,
    locks: BTreeSet<String>,
    waiting: BTreeMap<String, Vec<usize>>,
    broker_down: usize,
    store_down: usize,
    storm: bool,
    faults: usize,
    rejected: BTreeMap<MessageId, u32>,
    writers_left: usize,
    made: u64,
    tracing: bool,
    trace: Vec<String>,
}

impl World {
    pub(super) fn new(seed: u64, plan: Plan, tracing: bool) -> Self {
        let lanes = NonZeroU16::new(plan.lanes).unwrap_or(NonZeroU16::MIN);
        Self {
            seed,
            random: SmallRng::seed_from_u64(seed),
            now: Time::ZERO,
            order: 0,
            future: BinaryHeap::new(),
            database: Database::new(lanes),
            log: Log::default(),
            workers: (0..plan.workers).map(|_| Worker::default()).collect(),
            locks: BTreeSet::new(),
            waiting: BTreeMap::new(),
            broker_down: 0,
            store_down: 0,
            storm: plan.mode == Mode::Stormy,
            faults: 0,
            rejected: BTreeMap::new(),
            writers_left: plan.transactions,
            made: 0,
            tracing,
            trace: Vec::new(),
            plan,
        }
    }

    pub(super) fn run(mut self) -> Report {
        for worker in 0..self.workers.len() {
            let at = self.millis(0, START.as_millis() as u64);
            self.after(at, move |world| world.start(worker));
        }
        for number in 0..self.plan.transactions {
            let at = self.within_storm();
            self.after(at, move |world| world.write(number));
        }
        self.plan_faults();
        self.after(Duration::from_secs(3), Self::operate);
        let storm = self.plan.storm;
        self.after(storm + Duration::from_secs(5), |world| {
            world.note(|| "the storm is over".into());
            world.storm = false;
        });
        let end = storm + CALM_AFTER;
        while let Some(entry) = self.future.pop() {
            if entry.at > end || self.is_finished() {
                break;
            }
            self.now = entry.at;
            (entry.happen)(&mut self);
        }
        self.report()
    }

    fn is_finished(&self) -> bool {
        self.writers_left == 0
            && self.database.rows.is_empty()
            && self.now > self.plan.storm + Duration::from_secs(7)
    }

    fn report(mut self) -> Report {
        for id in self.log.missing(&self.database.dead) {
            self.log.violate(format!("lost or stuck: {id} never appeared"));
        }
        if !self.database.rows.is_empty() {
            let left = self.database.rows.len();
            let machines: Vec<_> = self.workers.iter().map(|worker| &worker.machine).collect();
            self.log.violate(format!("stuck: {left} rows are left at the end: {machines:?}"));
        }
        // A window within a key keeps the order only while nothing fails, as documented.
        if self.plan.settings.in_key_window == 1 || (self.faults == 0 && !self.log.has_failures()) {
            self.log.judge_order(&self.database.dead);
        }
        let cap = self.plan.settings.rows_in_flight;
        self.log.judge_repeats(cap, self.faults);
        Report {
            seed: self.seed,
            violations: self.log.take_violations(),
            committed: self.log.committed(),
            appearances: self.log.appearances(),
            repeated: self.log.repeated(),
            faults: self.faults,
            took: self.now,
            trace: self.trace,
        }
    }

    // ---- time and chance -----------------------------------------------------------------------

    fn after(&mut self, wait: Duration, happen: impl FnOnce(&mut Self) + 'static) {
        self.order += 1;
        let entry = Entry { at: self.now + wait, order: self.order, happen: Box::new(happen) };
        self.future.push(entry);
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_micros(self.random.random_range(from * 1_000..=to * 1_000))
    }

    fn within_storm(&mut self) -> Duration {
        let micros = self.plan.storm.as_micros() as u64;
        Duration::from_micros(self.random.random_range(0..=micros))
    }

    fn chance(&mut self, per_mille: u32) -> bool {
        self.storm && self.random.random_ratio(per_mille.min(1_000), 1_000)
    }

    fn fault(&mut self) {
        self.faults += 1;
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        if self.tracing {
            let line = format!("{:>10.3?} {}", self.now, text());
            self.trace.push(line);
        }
    }
}
