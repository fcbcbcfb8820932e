//! Time, chance and everything that happens.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use outbox_core::broker::{Outcome, PublishErrorKind};
use outbox_core::delivery::{Failure, Receipt};
use outbox_core::machine::{Action, Input, Machine, Time};
use outbox_core::store::{KeepLeases, Release, StoreErrorKind, StoreProfile};
use outbox_core::{Delivery, Lane, Message, MessageId, WorkerId};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::conduct::Conduct;
use super::database::{Database, Visibility};
use super::log::Log;
use super::{Mode, Plan, Report};

const TOPICS: [&str; 3] = ["orders", "skipping", "late"];
/// After the storm everything must be delivered within this time: leases, back-offs and probes
/// all end well before.
const CALM_AFTER: Duration = Duration::from_secs(150);

type Happening = Box<dyn FnOnce(&mut World)>;

struct Entry {
    at: Time,
    order: u64,
    happen: Happening,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

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
            let at = self.millis(0, 2_000);
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

    // ---- writers -------------------------------------------------------------------------------

    /// A writer begins a transaction: it locks the row of its aggregate, adds, and commits or
    /// rolls back some time later.
    fn write(&mut self, number: usize) {
        let key = self.random.random_range(0..self.plan.keys);
        let ordered = self.random.random_ratio(9, 10);
        if !ordered {
            return self.write_locked(number, None);
        }
        let lock = format!("key-{key}");
        if self.locks.insert(lock.clone()) {
            self.write_locked(number, Some(lock));
        } else {
            self.waiting.entry(lock).or_default().push(number);
        }
    }

    fn write_locked(&mut self, number: usize, lock: Option<String>) {
        let count = self.random.random_range(1..=4);
        let mut rows = Vec::new();
        if self.random.random_ratio(1, 20) {
            let skipped = self.random.random_range(1..=1_000);
            self.database.skip_ids(skipped);
        }
        for _ in 0..count {
            let topic = self.topic();
            let message = self.message(topic, lock.as_deref());
            let group = lock.as_ref().map(|lock| format!("{topic}/{lock}"));
            let lane = self.lane(lock.as_deref(), message.id());
            let id = self.database.insert(message.clone(), lane, self.now);
            rows.push((id, message.id(), group));
            self.note(|| format!("tx {number} adds row {id} {} {lock:?}", message.id()));
        }
        // In commit order there is one writer at a time, and nothing is open.
        let (written, done) = if self.plan.in_commit_order {
            (Duration::ZERO, Duration::ZERO)
        } else {
            let slow = self.random.random_ratio(1, 15);
            let written = self.millis(0, 50);
            (written, written + if slow { self.millis(2_000, 9_000) } else { self.millis(0, 40) })
        };
        let ids: Vec<u64> = rows.iter().map(|(id, ..)| *id).collect();
        let written_now = move |world: &mut Self| {
            for id in &ids {
                if let Some(row) = world.database.rows.get_mut(id) {
                    row.visibility = Visibility::Open;
                }
            }
        };
        if written.is_zero() {
            written_now(self)
        } else {
            self.after(written, written_now)
        }
        let commits = self.random.random_ratio(9, 10);
        let end = move |world: &mut Self| world.end(number, rows, lock, commits);
        if done.is_zero() { end(self) } else { self.after(done, end) }
    }

    fn end(
        &mut self,
        number: usize,
        rows: Vec<(u64, MessageId, Option<String>)>,
        lock: Option<String>,
        commits: bool,
    ) {
        self.note(|| format!("tx {number} {}", if commits { "commits" } else { "rolls back" }));
        for (id, message, group) in rows {
            if commits {
                if let Some(row) = self.database.rows.get_mut(&id) {
                    row.visibility = Visibility::Committed;
                }
                self.log.commit(message, group);
            } else {
                self.database.rows.remove(&id);
            }
        }
        self.writers_left -= 1;
        let Some(lock) = lock else { return };
        // The next writer of the key gets the lock at once: within a millisecond, as in real life.
        match self.waiting.get_mut(&lock).and_then(Vec::pop) {
            Some(next) => self.write_locked(next, Some(lock)),
            None => {
                self.locks.remove(&lock);
            }
        }
    }

    fn topic(&mut self) -> &'static str {
        match self.random.random_range(0..10) {
            0 => TOPICS[1],
            1 => TOPICS[2],
            _ => TOPICS[0],
        }
    }

    fn message(&mut self, topic: &str, key: Option<&str>) -> Message {
        self.made += 1;
        let mut bytes = [0; 16];
        bytes[8..].copy_from_slice(&self.made.to_be_bytes());
        let id = MessageId::from_bytes(bytes);
        let size = if self.random.random_ratio(1, 20) { 3_000 } else { 10 };
        let builder = Message::builder(topic).id(id).payload(vec![0; size]);
        let builder = match key {
            Some(key) => builder.key(key),
            None => builder,
        };
        if self.random.random_ratio(self.plan.poison.min(1_000), 1_000) {
            // How often it fails; the largest are rejected for good until an operator mends them.
            let times = *[1, 2, 5, u32::MAX].get(self.random.random_range(0..4)).unwrap_or(&1);
            self.rejected.insert(id, times);
        }
        builder.build().expect("the message is valid")
    }

    fn lane(&self, key: Option<&str>, id: MessageId) -> Lane {
        let bytes = key.map_or(&id.as_bytes()[..], str::as_bytes);
        let hash = bytes.iter().fold(7_u32, |hash, byte| hash.wrapping_mul(31) + u32::from(*byte));
        Lane((hash % u32::from(self.plan.lanes)) as u16)
    }

    // ---- faults and operators ------------------------------------------------------------------

    fn plan_faults(&mut self) {
        let workers = self.workers.len();
        for _ in 0..self.plan.crashes {
            let (at, worker) = (self.within_storm(), self.random.random_range(0..workers));
            self.after(at, move |world| world.crash(worker));
        }
        for _ in 0..self.plan.pauses {
            let (at, worker) = (self.within_storm(), self.random.random_range(0..workers));
            self.after(at, move |world| world.pause(worker));
        }
        for _ in 0..self.plan.restarts {
            let (at, worker) = (self.within_storm(), self.random.random_range(0..workers));
            self.after(at, move |world| world.give(worker, Input::ShutDown));
        }
        for _ in 0..self.plan.outages {
            let (at, long) = (self.within_storm(), self.millis(100, 20_000));
            self.after(at, move |world| {
                world.note(|| format!("broker down for {long:?}"));
                world.fault();
                world.broker_down += 1;
                world.after(long, |world| world.broker_down -= 1);
            });
        }
        if self.plan.cut_off {
            // For good: the others must deliver everything.
            let (at, worker) = (self.within_storm(), self.random.random_range(0..workers));
            self.after(at, move |world| {
                world.note(|| format!("worker {worker} is cut off from the broker"));
                world.fault();
                world.workers[worker].cut = true;
            });
        }
        for _ in 0..self.plan.store_outages {
            let (at, long) = (self.within_storm(), self.millis(100, 15_000));
            self.after(at, move |world| {
                world.note(|| format!("store down for {long:?}"));
                world.fault();
                world.store_down += 1;
                world.after(long, |world| world.store_down -= 1);
            });
        }
        for _ in 0..self.plan.clock_steps {
            // A step back by an hour lets dead workers' leases last an hour longer, as documented.
            let (at, step) = (self.within_storm(), self.random.random_range(-20..3_600_i64));
            self.after(at, move |world| {
                world.note(|| format!("the store's clock steps by {step} s"));
                world.fault();
                let clock = world.database.clock.as_secs() as i64 + step;
                world.database.clock = Duration::from_secs(clock.max(0) as u64);
            });
        }
        for _ in 0..self.plan.server_changes {
            let at = self.within_storm();
            self.after(at, move |world| {
                world.note(|| "another server answers".into());
                world.fault();
                world.database.server += 1;
            });
        }
    }

    fn operate(&mut self) {
        for id in self.database.held() {
            let retry = self.random.random_ratio(2, 3);
            self.note(|| format!("operator {} row {id}", if retry { "retries" } else { "skips" }));
            if retry {
                if let Some(row) = self.database.rows.get(&id) {
                    self.rejected.remove(&row.message.id());
                }
                self.database.retry(id);
            } else {
                self.database.skip(id);
            }
        }
        self.after(Duration::from_secs(5), Self::operate);
    }

    // ---- workers -------------------------------------------------------------------------------

    fn start(&mut self, index: usize) {
        let lanes = NonZeroU16::new(self.plan.lanes).unwrap_or(NonZeroU16::MIN);
        let profile = StoreProfile::new(lanes);
        let profile = if self.plan.in_commit_order { profile.in_commit_order() } else { profile };
        let mut settings = self.plan.settings.clone();
        let id: [u8; 16] = self.random.random();
        settings.worker = WorkerId::from_bytes(id);
        settings.seed = self.random.random();
        let worker = &mut self.workers[index];
        worker.id = Some(settings.worker);
        worker.machine = Some(Machine::new(settings, profile, self.now));
        self.note(|| format!("worker {index} starts"));
        self.act(index);
    }

    fn crash(&mut self, index: usize) {
        if self.workers[index].machine.is_none() {
            return;
        }
        self.note(|| format!("worker {index} crashes"));
        self.fault();
        self.stop(index);
    }

    fn stop(&mut self, index: usize) {
        let worker = &mut self.workers[index];
        worker.machine = None;
        worker.life += 1;
        worker.inbox.clear();
        worker.conduct = Conduct::default();
        let wait = self.millis(0, 9_000);
        self.after(wait, move |world| {
            if world.workers[index].machine.is_none() {
                world.start(index);
            }
        });
    }

    fn pause(&mut self, index: usize) {
        if self.workers[index].machine.is_none() || self.workers[index].paused {
            return;
        }
        self.fault();
        let long = self.millis(100, 15_000);
        self.note(|| format!("worker {index} stands still for {long:?}"));
        self.workers[index].paused = true;
        self.after(long, move |world| {
            world.note(|| format!("worker {index} goes on"));
            world.workers[index].paused = false;
            for input in std::mem::take(&mut world.workers[index].inbox) {
                world.give(index, input);
            }
            world.act(index);
        });
    }

    /// Hands an input to a worker, unless it has crashed since `life`.
    fn answer(&mut self, index: usize, life: u64, input: Input) {
        if self.workers[index].life == life {
            self.give(index, input);
        }
    }

    fn give(&mut self, index: usize, input: Input) {
        let worker = &mut self.workers[index];
        if worker.paused {
            return worker.inbox.push(input);
        }
        if let Some(machine) = &mut worker.machine {
            worker.conduct.hears(&input);
            machine.handle(input, self.now);
            self.act(index);
        }
    }

    fn act(&mut self, index: usize) {
        loop {
            let worker = &mut self.workers[index];
            if worker.paused {
                return;
            }
            let Some(machine) = &mut worker.machine else { return };
            let Some(action) = machine.poll(self.now) else { break };
            self.perform(index, action);
        }
        let now = self.now;
        let worker = &mut self.workers[index];
        let Some(machine) = &mut worker.machine else { return };
        for event in machine.take_events() {
            if self.tracing {
                self.trace.push(format!("{now:>10.3?} worker {index} {event:?}"));
            }
        }
        worker.alarm += 1;
        let (alarm, wait) = (worker.alarm, machine.wake_at(now).saturating_sub(now));
        self.after(wait, move |world| {
            if world.workers[index].alarm == alarm {
                world.act(index);
            }
        });
    }

    fn perform(&mut self, index: usize, action: Action) {
        let life = self.workers[index].life;
        self.note(|| format!("worker {index} {}", summary(&action)));
        let Some(me) = self.workers[index].id else { return };
        let ttl = self.plan.settings.lease;
        match action {
            Action::Keep(order) => self.call(index, life, Input::Kept, move |world| {
                let request = KeepLeases::new(me, ttl).healthy(order.healthy);
                world.database.keep(&request.renew(&order.renew).take(&order.take), world.now)
            }),
            Action::Claim(order) => self.claim(index, life, order),
            Action::Settle(number, order) => {
                self.workers[index].conduct.settles(number, &order);
                let input = move |result| Input::Settled(number, result);
                self.call(index, life, input, move |world| {
                    let (settled, delivered) = world.database.settle(&order.request(), world.now);
                    for id in delivered {
                        if !world.log.contains(id) {
                            world.log.violate(format!("loss: {id} was deleted before it appeared"));
                        }
                    }
                    settled
                });
            }
            Action::Release(leases, leaving) => {
                self.call(index, life, Input::Released, move |world| {
                    let request = Release::new(me, &leases);
                    let request = if leaving { request.leaving() } else { request };
                    world.database.release(&request, world.now);
                });
            }
            Action::Publish(batch, deliveries) => self.publish(index, life, batch, deliveries),
            Action::Check => {
                let wait = self.millis(0, 20);
                self.after(wait, move |world| {
                    let down = world.is_unreachable(index);
                    let result = if down { Err(PublishErrorKind::Unavailable) } else { Ok(()) };
                    world.answer(index, life, Input::Checked(result));
                });
            }
            Action::Count => {
                self.call(index, life, Input::Counted, |_| outbox_core::store::Backlog::default());
            }
            Action::Purge(_) => self.call(index, life, Input::Purged, |_| 0),
            Action::Close(within) => {
                let wait = self.millis(0, within.as_millis() as u64);
                self.after(wait, move |world| {
                    // Whatever a shutdown past its limit did not wait for is unknown.
                    for _ in 0..world.workers[index].conduct.unanswered() {
                        world.log.ambiguous();
                    }
                    world.answer(index, life, Input::Closed);
                });
            }
            Action::Stop => {
                self.stop(index);
            }
            _ => unreachable!("no other action exists"),
        }
    }

    // ---- the store -----------------------------------------------------------------------------

    /// How a call to the store goes: when it takes effect, if it does, and when the answer comes,
    /// if it does before the deadline.
    fn fate(&mut self) -> (Option<Duration>, Option<Duration>) {
        let deadline = self.plan.settings.statement_deadline;
        let there = self.latency();
        let back = there + self.latency();
        if self.store_down > 0 {
            self.fault();
            return (None, None);
        }
        if !self.chance(self.plan.store_faults) {
            return (Some(there), (back < deadline).then_some(back));
        }
        self.fault();
        let late = self.millis(0, 2_000);
        match self.random.random_range(0..4) {
            0 => (None, None),
            1 => (Some(there), None),
            2 => (Some(late), (late + there < deadline).then_some(late + there)),
            _ => (Some(there), (late < deadline).then_some(late.max(there))),
        }
    }

    fn latency(&mut self) -> Duration {
        let slow = self.random.random_ratio(1, 30);
        Duration::from_micros(self.random.random_range(20..=if slow { 20_000 } else { 800 }))
    }

    fn call<T: 'static>(
        &mut self,
        index: usize,
        life: u64,
        input: impl Fn(Result<T, StoreErrorKind>) -> Input + 'static,
        effect: impl FnOnce(&mut Self) -> T + 'static,
    ) {
        let (effect_at, answer_at) = self.fate();
        let deadline = self.plan.settings.statement_deadline;
        let Some(answer_at) = answer_at else {
            // The deadline passes, or the connection breaks before it; the effect may come later.
            let broken = if self.random.random_bool(0.5) { deadline } else { deadline / 20 };
            if let Some(at) = effect_at {
                self.after(at, move |world| {
                    effect(world);
                });
            }
            return self.after(broken, move |world| {
                world.answer(index, life, input(Err(StoreErrorKind::Unavailable)));
            });
        };
        let back = answer_at.saturating_sub(effect_at.unwrap_or_default());
        self.after(effect_at.unwrap_or_default(), move |world| {
            let value = effect(world);
            world.after(back, move |world| world.answer(index, life, input(Ok(value))));
        });
    }

    /// A claim has two snapshots: the page's, and a later one of everything else.
    fn claim(&mut self, index: usize, life: u64, order: Arc<outbox_core::machine::ClaimOrder>) {
        let (effect_at, answer_at) = self.fate();
        let deadline = self.plan.settings.statement_deadline;
        let (Some(at), Some(answer_at)) = (effect_at, answer_at) else {
            return self.after(deadline, move |world| {
                world.answer(index, life, Input::Claimed(Err(StoreErrorKind::Unavailable)));
            });
        };
        let slow = self.plan.slow_reads && self.random.random_ratio(1, 4);
        let longer = if slow { self.millis(5, 400) } else { Duration::ZERO };
        let between = (answer_at + longer).saturating_sub(at) / 2;
        self.after(at, move |world| {
            let mut reply = world.database.page(&order.request(), world.now);
            world.after(between, move |world| {
                world.database.rest(&order.request(), &mut reply, world.now);
                world.after(between, move |world| {
                    world.answer(index, life, Input::Claimed(Ok(reply)));
                });
            });
        });
    }

    // ---- the broker ----------------------------------------------------------------------------

    fn publish(&mut self, index: usize, life: u64, batch: u64, all: Vec<(Delivery, Time)>) {
        let undecided = self.plan.settings.undecided;
        self.judge_publish(index, batch, &all);
        let together = self.plan.settings.in_key_window > 1;
        let mut wait = Duration::ZERO;
        for (number, (delivery, not_after)) in all.into_iter().enumerate() {
            if number == 0 || !together {
                wait = Duration::from_micros(self.random.random_range(0..=200));
            }
            self.after(wait, move |world| {
                world.hand_over(index, life, batch, number, delivery, not_after);
            });
        }
        self.after(undecided + Duration::from_millis(300), move |world| {
            world.answer(index, life, Input::PublishEnded(batch));
        });
    }

    /// When a message reaches the log: behind what the worker handed over of its key before.
    fn in_line(&mut self, index: usize, delivery: &Delivery) -> Duration {
        let soon = self.latency();
        let (topic, key) = (delivery.message.topic(), delivery.message.key());
        let Some(key) = key else { return soon };
        let line = (topic.to_owned(), key.to_owned());
        let last = self.workers[index].lines.entry(line).or_default();
        *last = (*last).max(self.now + soon);
        *last - self.now
    }

    fn is_unreachable(&self, index: usize) -> bool {
        self.broker_down > 0 || self.workers[index].cut
    }

    fn judge_publish(&mut self, index: usize, batch: u64, all: &[(Delivery, Time)]) {
        let Some(me) = self.workers[index].id else { return };
        let cap = self.plan.settings.rows_in_flight;
        for text in self.workers[index].conduct.publishes(batch, all, cap) {
            self.log.violate(text);
        }
        // Steps of the store's clock shorten leases, and none can be known to have happened.
        if self.plan.clock_steps > 0 {
            return;
        }
        for (delivery, not_after) in all {
            let lease_ends = self.database.granted(me, delivery.lane);
            if lease_ends.is_none_or(|end| *not_after + self.plan.settings.undecided > end) {
                let id = delivery.message.id();
                self.log.violate(format!("too late: {id} may be undecided when its lease ends"));
            }
        }
    }

    fn hand_over(
        &mut self,
        index: usize,
        life: u64,
        batch: u64,
        number: usize,
        delivery: Delivery,
        not_after: Time,
    ) {
        // A worker that stands still does not hand over; one that crashed never will.
        if self.workers[index].life != life {
            return;
        }
        if self.workers[index].paused {
            return self.after(Duration::from_millis(50), move |world| {
                world.hand_over(index, life, batch, number, delivery, not_after);
            });
        }
        let id = delivery.message.id();
        let undecided = self.plan.settings.undecided;
        let topic = delivery.message.topic();
        let fails = self.rejected.get(&id).copied();
        let unknown_topic = self.plan.unknown_topic && topic == TOPICS[2] && self.storm;
        let soon = self.in_line(index, &delivery);
        let refuse = |kind: PublishErrorKind| Outcome::Failed(kind, Failure::new("test", ""));
        let (append, outcome, wait) = if self.now >= not_after {
            (None, refuse(PublishErrorKind::NotSent), Duration::ZERO)
        } else if self.is_unreachable(index) {
            let kind = if self.random.random_bool(0.5) {
                (PublishErrorKind::Unavailable, soon)
            } else {
                (PublishErrorKind::Unknown, undecided)
            };
            (None, refuse(kind.0), kind.1)
        } else if unknown_topic {
            self.fault();
            (None, refuse(PublishErrorKind::Destination), soon)
        } else if let Some(times) = fails {
            let kind = if times == u32::MAX {
                PublishErrorKind::Rejected
            } else {
                match times {
                    1 => self.rejected.remove(&id),
                    _ => self.rejected.insert(id, times - 1),
                };
                PublishErrorKind::Failed
            };
            self.log.failure(id);
            (None, refuse(kind), soon)
        } else if self.chance(self.plan.broker_faults) {
            self.fault();
            let unknown = refuse(PublishErrorKind::Unknown);
            let late = self.millis(0, 4_000);
            match self.random.random_range(0..4) {
                0 => (None, unknown, undecided),
                // No answer at all: the end of the publish must do.
                1 => (None, unknown, Duration::MAX),
                2 => (Some(soon), unknown, undecided),
                // It travels on though the client has given it up.
                _ => (Some(late), unknown, undecided),
            }
        } else {
            let slow = self.plan.slow_answers && self.random.random_ratio(1, 3);
            let answer = if slow { self.millis(0, 1_500) } else { self.latency() };
            (Some(soon), Outcome::Delivered(Receipt::default()), soon + answer)
        };
        if matches!(outcome, Outcome::Failed(PublishErrorKind::Unknown, _)) {
            self.log.ambiguous();
        }
        if let Some(append) = append {
            self.after(append, move |world| {
                world.note(|| format!("log: {id}"));
                world.log.append(id);
            });
        }
        if wait < Duration::MAX {
            let input = Input::Answered(batch, vec![(number, outcome)]);
            self.after(wait, move |world| world.answer(index, life, input));
        }
        let attempts = delivery.state.attempts;
        if attempts > self.log.counted(id) {
            self.log.violate(format!("attempts: {attempts} are counted for {id}"));
        }
    }
}

fn summary(action: &Action) -> String {
    match action {
        Action::Publish(batch, all) => {
            let rows: Vec<_> = all.iter().map(|(delivery, _)| delivery.position.0).collect();
            format!("publishes {batch}: {rows:?}")
        }
        other => format!("{other:?}"),
    }
}
