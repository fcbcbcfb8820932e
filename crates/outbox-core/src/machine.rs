//! The dispatcher's decisions: a synchronous machine without I/O.
//!
//! It takes inputs (leases kept, rows claimed, answers, settlements, time) with the current time
//! and answers with actions; the tokio shell only performs them. The same machine runs under the
//! deterministic simulation. It is public for that purpose: this module is not covered by semantic
//! versioning.

mod ahead;
mod circuit;
mod claimed;
mod claiming;
mod fingerprint;
mod horizon;
mod keys;
mod lanes;
mod leasing;
mod orders;
mod pace;
mod publishing;
mod settings;
mod settling;
mod topics;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use self::circuit::Circuit;
use self::claiming::{CatchUp, LaneRows};
use self::horizon::Horizon;
use self::keys::{Key, KeyId, Map};
use self::leasing::Leases;
use self::orders::PageOrder;
pub use self::orders::{Action, ClaimOrder, Input, KeepOrder, SettleOrder};
use self::pace::Pace;
use self::publishing::{AMBIGUOUS, Batch};
pub use self::settings::Settings;
use self::settling::{Fading, Unsettled};
use self::topics::{TopicId, Topics};
use crate::broker::PublishErrorKind;
use crate::delivery::{Delivery, Failure, Lane, Position, RowState};
use crate::message::MessageId;
use crate::observe::{Event, Step};
use crate::retry::Retention;
use crate::seeded::seeded;
use crate::status::{Health, Status};
use crate::store::{Backlog, Purge, StoreErrorKind, StoreProfile};

/// Time since a fixed moment, on a clock that never goes back.
pub type Time = Duration;

/// A row whose message is known.
#[derive(Debug, Clone)]
struct Row {
    lane: Lane,
    epoch: u64,
    key: KeyId,
    topic: TopicId,
    id: MessageId,
    attempts: u32,
    revision: u32,
    held: bool,
    /// Of its content; at most 4 GiB are told apart.
    bytes: u32,
    phase: Phase,
    content: Option<Box<Delivery>>,
    unreadable: Option<Box<Failure>>,
    /// No attempt before this time.
    parked_until: Option<Time>,
    /// Tries whose outcome stayed unknown, and tries that were not sent. They are not counted with
    /// the row.
    unknown: u16,
    not_sent: u16,
    /// When the row was added, on our clock.
    added_at: Time,
    /// Answers to this claim and earlier ones may be older than what we know of the row.
    changed_at_claim: u64,
}

// A million of them may wait at once.
const _: () = assert!(size_of::<Row>() <= 112);

impl Row {
    /// A row of which nothing is recorded yet.
    fn new(
        lane: Lane,
        epoch: u64,
        key: KeyId,
        topic: TopicId,
        id: MessageId,
        added_at: Time,
    ) -> Self {
        Self {
            lane,
            epoch,
            key,
            topic,
            id,
            attempts: 0,
            revision: 0,
            held: false,
            bytes: 0,
            phase: Phase::Barred,
            content: None,
            unreadable: None,
            parked_until: None,
            unknown: 0,
            not_sent: 0,
            added_at,
            changed_at_claim: 0,
        }
    }

    /// What a store compares a decision with.
    fn as_read(&self) -> RowState {
        RowState::new(self.attempts, self.revision).with_held(self.held)
    }

    fn set_bytes(&mut self, bytes: usize) {
        self.bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
    }

    fn bytes(&self) -> usize {
        self.bytes as usize
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Above a row of its lane that must be read first.
    Barred,
    /// In the queue of its key.
    Queued,
    /// At the broker.
    Offered,
    /// Acknowledged; its settlement is not confirmed, or a claim may still bring it in.
    Acknowledged,
    /// Its failure is being recorded.
    Writing,
    /// Its failure was not recorded: it must be read again to know how it stands.
    Unclear,
}

/// The claim that is out.
#[derive(Debug, Clone)]
struct Claiming {
    number: u64,
    order: Arc<ClaimOrder>,
    epochs: BTreeMap<Lane, u64>,
    sent: Time,
    /// What it was asked after is forgotten, since another server answers.
    void: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Running,
    /// Waiting for outcomes and settlements until the time is up.
    Draining(Time),
    /// The broker is being closed.
    Closing(Time),
    /// The last settlements, until the time is up.
    Settling(Time),
    Releasing,
    Stopping,
    Stopped,
}

/// The dispatcher's state machine.
#[derive(Clone)]
pub struct Machine {
    settings: Settings,
    profile: StoreProfile,
    random: SmallRng,
    events: Vec<Event>,
    stage: Stage,

    leases: Leases,
    keeping: Option<(KeepOrder, Time)>,
    keep_at: Time,
    keep_failing: Option<Time>,
    releasing: bool,
    server: Option<u64>,

    horizon: Horizon,
    pace: Pace,
    claiming: Option<Claiming>,
    claims: u64,
    claim_failing: Option<Time>,
    /// How often the size of claims is halved: one more for each that took too long.
    smaller: u32,
    lanes: Map<Lane, LaneRows>,
    fresh_lanes: Vec<Lane>,
    catch_up: Option<CatchUp>,
    turn: bool,
    typical_bytes: usize,
    recheck: Vec<Position>,
    watch_at: Time,
    watch_after: Position,
    scan_at: Time,
    scan_after: Position,
    /// How many ids a scan may pass.
    scan_width: u64,
    /// What was swept in parts so far, while a sweep of all takes too long.
    sweep_after: Option<Position>,
    /// How many ids a part may pass.
    part_width: u64,
    caught_up: bool,
    full: bool,

    /// Boxed: a map has up to twice the room that it needs, and there may be a million of them.
    rows: Map<Position, Box<Row>>,
    keys: Map<KeyId, Key>,
    topics: Topics,
    loaded_rows: usize,
    loaded_bytes: usize,
    ready: VecDeque<(KeyId, TopicId)>,
    thirsty: VecDeque<KeyId>,
    stalled_by_lane: Vec<KeyId>,
    parked: BinaryHeap<Reverse<(Time, KeyId)>>,
    watched: BTreeSet<Position>,

    circuit: Circuit,
    batches: BTreeMap<u64, Batch>,
    next_batch: u64,
    published_at: Time,
    offered: usize,

    unsettled: Unsettled,
    fading: VecDeque<Fading>,

    checked: bool,
    checking: bool,
    check_at: Time,
    /// How often in a row the lanes were given up for those who may deliver what this worker cannot.
    given_up: u32,
    purging: bool,
    purge_at: Time,
    counting: bool,
    count_at: Time,
    /// When it was counted last.
    counted_at: Time,
    backlog: Option<Backlog>,
    last_progress: Time,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("stage", &self.stage)
            .field("lanes", &self.leases.len())
            .field("position", &self.horizon.position())
            .field("holes", &self.horizon.hole_count())
            .field("rows", &self.rows.len())
            .field("keys", &self.keys.len())
            .field("offered", &self.offered)
            .field("loaded", &(self.loaded_rows, self.loaded_bytes))
            .field("ready", &self.ready.len())
            .field("thirsty", &self.thirsty.len())
            .field("unsettled", &self.unsettled.rows())
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// A machine that has opened a store with this profile and holds no lanes yet.
    pub fn new(settings: Settings, profile: StoreProfile, now: Time) -> Self {
        // A topic may use half of the window, so that no other one ever waits for it alone.
        let topics =
            Topics::new(settings.topics.clone(), settings.retry, settings.rows_in_flight / 2);
        Self {
            random: SmallRng::seed_from_u64(settings.seed),
            events: Vec::new(),
            stage: Stage::Running,
            leases: Leases::new(settings.worker, settings.lease),
            keeping: None,
            keep_at: now,
            keep_failing: None,
            releasing: false,
            server: None,
            horizon: Horizon::default(),
            pace: Pace::new(settings.poll_shortest, settings.poll_busiest, settings.poll_longest),
            claiming: None,
            claims: 0,
            claim_failing: None,
            smaller: 0,
            lanes: Map::default(),
            fresh_lanes: Vec::new(),
            catch_up: None,
            turn: false,
            typical_bytes: 1024,
            recheck: Vec::new(),
            watch_at: now,
            watch_after: Position::START,
            scan_at: now + settings.scan_every,
            scan_after: Position::START,
            scan_width: u64::MAX,
            sweep_after: None,
            part_width: 0,
            caught_up: false,
            full: false,
            rows: Map::default(),
            keys: Map::default(),
            topics,
            loaded_rows: 0,
            loaded_bytes: 0,
            ready: VecDeque::new(),
            thirsty: VecDeque::new(),
            stalled_by_lane: Vec::new(),
            parked: BinaryHeap::new(),
            watched: BTreeSet::new(),
            circuit: Circuit::default(),
            batches: BTreeMap::new(),
            next_batch: 0,
            published_at: now,
            offered: 0,
            unsettled: Unsettled::default(),
            fading: VecDeque::new(),
            checked: false,
            checking: false,
            check_at: now,
            given_up: 0,
            purging: false,
            purge_at: now,
            counting: false,
            count_at: now,
            counted_at: now,
            backlog: None,
            last_progress: now,
            settings,
            profile,
        }
    }

    /// Takes in something that happened.
    pub fn handle(&mut self, input: Input, now: Time) {
        match input {
            Input::Kept(result) => self.kept(result, now),
            Input::Claimed(result) => self.claimed(result, now),
            Input::Answered(batch, answers) => self.all_answered(batch, answers, now),
            Input::PublishEnded(batch) => self.publish_ended(batch, now),
            Input::Settled(number, result) => self.settled(number, result, now),
            Input::Released(result) => self.released(result),
            Input::Checked(result) => self.checked(result, now),
            Input::Purged(result) => self.purged(result, now),
            Input::Counted(result) => self.counted(result, now),
            Input::Closed => self.closed(now),
            Input::Rung(urgency) => self.pace.rung(urgency, self.claiming.is_some(), now),
            Input::ShutDown => self.shut_down(now),
        }
    }

    /// The next thing to do now. Call until it answers `None`.
    pub fn poll(&mut self, now: Time) -> Option<Action> {
        self.pass_time(now);
        self.next_keep(now)
            .or_else(|| self.next_settle(now))
            .or_else(|| self.next_publish(now))
            .or_else(|| self.next_claim(now))
            .or_else(|| self.next_release(now))
            .or_else(|| self.next_chore(now))
            .or_else(|| self.next_step_down(now))
    }

    /// When [`poll`](Self::poll) may have something to do though nothing happens.
    pub fn wake_at(&self, now: Time) -> Time {
        let mut next = now + Duration::from_secs(1);
        let mut at = |time: Time| next = next.min(time);
        if self.keeping.is_none() && !self.releasing {
            at(self.keep_at);
        }
        for (_, held) in self.leases.iter() {
            at(held.until);
        }
        if self.claiming.is_none() && self.leases.len() > 0 && self.stage == Stage::Running {
            // After a failed claim nothing is read before the next page is due.
            let not_before = self.claim_failing.map_or(now, |_| self.pace.next());
            at(self.watch_at.max(not_before));
            if self.may_scan() {
                at(self.scan_at.max(not_before));
            }
            if self.may_page(now) {
                at(self.pace.next());
            } else if !self.profile.in_commit_order {
                at(self.horizon.know_at().max(not_before));
            }
        }
        if let Some(time) = self.unsettled.due(&self.settings) {
            at(time);
        }
        if let Some(Reverse((time, _))) = self.parked.peek() {
            at(*time);
        }
        if self.is_gathering(now) {
            at(self.gather_until());
        }
        // While the broker is down, no topic is probed on its own.
        let probe = match self.circuit.is_open() {
            true => self.circuit.probe_at().filter(|at| *at > now || !self.ready.is_empty()),
            false => self.topics.probe_at(),
        };
        if let Some(time) = probe {
            at(time);
        }
        if self.needs_check() {
            at(self.check_at);
        }
        match self.stage {
            Stage::Draining(until) | Stage::Settling(until) => at(until),
            _ => {}
        }
        // Something overdue that cannot be done yet must not spin.
        next.max(now + Duration::from_micros(500))
    }

    /// Takes the events since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// How the dispatcher is doing.
    pub fn status(&self, now: Time) -> Status {
        // Without lanes nothing is counted or sent: what was known before says nothing any more.
        let has_lanes = self.leases.len() > 0;
        let topics = self.topics.ids().map(|id| self.topics.get(id));
        let closed = topics.filter(|topic| has_lanes && topic.is_closed());
        Status {
            health: self.health(now),
            lanes: self.leases.len(),
            in_flight: self.in_flight(),
            content_bytes: self.loaded_bytes,
            known: self.rows.len() + self.lanes.values().map(LaneRows::unread_count).sum::<usize>(),
            held_keys: self.watched.len(),
            closed_topics: closed.map(|topic| Arc::clone(&topic.name)).collect(),
            backlog: self.backlog.filter(|_| has_lanes),
            last_delivery: self.circuit.last_ack().map(|ack| now.saturating_sub(ack)),
            detail: self.leases.waiting_for(now).map(|(worker, wait)| {
                format!("waiting for the lanes of {worker}, {} s", wait.as_secs())
            }),
            warnings: self.profile.warnings.clone(),
        }
    }

    fn health(&self, now: Time) -> Health {
        let store_down = self.keep_failing.or(self.claim_failing).or(self.unsettled.failing());
        let stuck = now.saturating_sub(self.last_progress) > self.settings.lease;
        match self.stage {
            Stage::Stopped => Health::Stopped,
            Stage::Running if self.server.is_none() && store_down.is_none() => Health::Starting,
            Stage::Running => {
                if let Some(since) = store_down {
                    Health::StoreDown { since: now.saturating_sub(since) }
                } else if let Some(since) = self.circuit.open_since() {
                    Health::BrokerDown { since: now.saturating_sub(since) }
                } else if !self.checked {
                    Health::BrokerDown { since: now.saturating_sub(self.last_progress) }
                } else if self.leases.len() == 0 {
                    Health::Standby
                } else if self.is_idle() {
                    Health::Idle
                } else if stuck {
                    Health::Stuck { since: now.saturating_sub(self.last_progress) }
                } else {
                    Health::Working
                }
            }
            _ => Health::Draining,
        }
    }

    fn in_flight(&self) -> usize {
        self.offered + self.unsettled.rows()
    }

    fn is_held(&self, position: Position) -> bool {
        self.rows.get(&position).is_some_and(|row| row.held)
    }

    /// Whether nothing is left that could be delivered now: held keys wait for an operator.
    fn is_idle(&self) -> bool {
        let blocked = |key: &Key| key.queue.front().is_some_and(|head| self.is_held(head));
        self.caught_up
            && self.in_flight() == 0
            && self.unsettled.is_empty()
            && self.fresh_lanes.is_empty()
            && self.catch_up.is_none()
            && self.lanes.values().all(|lane| lane.unread_count() == 0)
            && self.keys.values().all(|key| key.queue.is_empty() || blocked(key))
    }

    /// Whether this worker makes progress: lanes go to those that do.
    fn is_healthy(&self, now: Time) -> bool {
        if seeded!("sick-worker-keeps-its-lanes") {
            return true;
        }
        let limit = self.settings.lease / 3;
        let for_long = |since: Option<Time>| since.is_some_and(|s| now.saturating_sub(s) >= limit);
        self.checked
            && self.stage == Stage::Running
            && !for_long(self.circuit.open_since())
            && !for_long(self.claim_failing)
            && !for_long(self.unsettled.failing())
    }

    fn chance(&mut self) -> f64 {
        self.random.random::<f64>()
    }

    fn tell(&mut self, event: Event) {
        self.events.push(event);
    }

    fn store_failed(&mut self, step: Step, kind: StoreErrorKind) {
        self.tell(Event::StoreFailed { step, kind });
    }

    // ---- time ----------------------------------------------------------------------------------

    fn pass_time(&mut self, now: Time) {
        let expired = self.leases.expire(now);
        self.lose(expired, now);
        let troubled = self.claim_failing.is_some() || self.circuit.open_since().is_some();
        if self.leases.len() == 0 && self.checked && troubled {
            // Without lanes nothing shows that store and broker work again: a check must, or this
            // worker would never take a lane again.
            self.checked = false;
            self.check_at = now + self.time_off();
        }
        while let Some(Reverse((time, key))) = self.parked.peek().copied() {
            if time > now {
                break;
            }
            self.parked.pop();
            if let Some(parked) = self.keys.get_mut(&key) {
                parked.timer = parked.timer.filter(|timer| *timer != time);
            }
            self.place(key, now);
        }
        for id in self.topics.ids() {
            self.unstall(id, now);
        }
    }

    // ---- chores --------------------------------------------------------------------------------

    fn needs_check(&self) -> bool {
        let asked_for = !self.checked || self.circuit.open_since().is_some();
        asked_for && !self.checking && self.stage == Stage::Running
    }

    /// How long a worker that gave its lanes up stays without: a check may pass where nothing can be
    /// delivered, and it would take them at once from those who deliver.
    fn time_off(&self) -> Duration {
        let lease = self.settings.lease;
        match self.given_up {
            0 => Duration::ZERO,
            times => (lease / 3 * (1 << (times - 1).min(5))).min(10 * lease),
        }
    }

    fn next_chore(&mut self, now: Time) -> Option<Action> {
        if self.stage != Stage::Running {
            return None;
        }
        if self.needs_check() && self.check_at <= now {
            self.checking = true;
            return Some(Action::Check);
        }
        if self.leases.len() == 0 {
            return None;
        }
        if let Retention::Keep(older_than) = self.settings.retention
            && !self.purging
            && self.purge_at <= now
        {
            self.purging = true;
            return Some(Action::Purge(Purge::new(older_than, 1_000)));
        }
        if !self.counting && self.count_at <= now {
            self.counting = true;
            return Some(Action::Count);
        }
        None
    }

    fn checked(&mut self, result: Result<(), PublishErrorKind>, now: Time) {
        self.checking = false;
        let has_lanes = self.leases.len() > 0;
        if !has_lanes && self.check_at > now {
            return; // Asked while there were lanes: it would end the time without them.
        }
        self.check_at = now + Duration::from_secs(1);
        let passed = result.is_ok();
        if has_lanes {
            // Whether messages arrive is what counts; a check tells how many may try. Where none
            // waits, or none found trouble for longer than a doubtful one waits, is read and is
            // undecided, no message will tell more.
            self.circuit.checked(passed);
            self.checked |= passed;
            let settings = &self.settings;
            let long = AMBIGUOUS.cap() + settings.statement_deadline + settings.undecided;
            let long = if self.is_idle() { Duration::ZERO } else { long };
            return self.well_for(long, now);
        }
        self.checked = passed;
        self.claim_failing = None;
        if passed {
            self.keep_at = self.keep_at.min(now);
            if let Some(since) = self.circuit.close() {
                self.tell(Event::CircuitClosed { after: now.saturating_sub(since) });
            }
        } else {
            let random = self.chance();
            if self.circuit.troubled(now, now, random) {
                self.tell(Event::CircuitOpened);
            }
        }
    }

    fn purged(&mut self, result: Result<u64, StoreErrorKind>, now: Time) {
        self.purging = false;
        let Retention::Keep(older_than) = self.settings.retention else { return };
        let pause = (older_than / 10).clamp(Duration::from_secs(1), Duration::from_secs(60));
        match result {
            Ok(rows) => {
                // A full batch is followed soon, with a pause that leaves room to others.
                let wait = if rows >= 1_000 { Duration::from_millis(20) } else { pause };
                self.purge_at = now + wait;
                if rows > 0 {
                    self.tell(Event::Purged { rows });
                }
            }
            Err(kind) => {
                self.purge_at = now + pause;
                self.store_failed(Step::Purge, kind);
            }
        }
    }

    fn counted(&mut self, result: Result<Backlog, StoreErrorKind>, now: Time) {
        self.counting = false;
        let every = self.settings.count_every;
        self.count_at = now + every;
        match result {
            Ok(backlog) => {
                self.backlog = Some(backlog);
                self.counted_at = now;
                self.tell(Event::BacklogSampled { backlog });
            }
            Err(kind) => {
                self.count_at = now + every.min(Duration::from_secs(1));
                // What was counted long before is no news: an alert on it would never come.
                if now.saturating_sub(self.counted_at) > 2 * every && self.backlog.take().is_some()
                {
                    self.tell(Event::BacklogUnknown);
                }
                self.store_failed(Step::Backlog, kind);
            }
        }
    }

    // ---- stopping ------------------------------------------------------------------------------

    fn shut_down(&mut self, now: Time) {
        if self.stage == Stage::Running {
            self.stage = Stage::Draining(now + self.settings.drain_limit);
        }
    }

    fn next_step_down(&mut self, now: Time) -> Option<Action> {
        match self.stage {
            Stage::Running if self.settings.until_empty && self.is_done() => {
                self.shut_down(now);
                self.next_step_down(now)
            }
            Stage::Draining(_) if seeded!("release-before-the-answers") => {
                self.stage = Stage::Releasing;
                self.releasing = true;
                Some(Action::Release(self.leases.all(), true))
            }
            Stage::Draining(_) if self.settings.until_empty && self.offered == 0 => {
                // The broker has nothing of ours, and may be asked to deliver again.
                self.stage = Stage::Settling(now + self.settings.statement_deadline * 2);
                self.next_step_down(now)
            }
            Stage::Draining(until) if self.offered == 0 || until <= now => {
                self.stage = Stage::Closing(now);
                Some(Action::Close(until.saturating_sub(now).min(self.settings.undecided)))
            }
            Stage::Settling(until) if self.unsettled.is_empty() || until <= now => {
                if self.keeping.is_some() || self.releasing {
                    return None;
                }
                self.stage = Stage::Releasing;
                self.releasing = true;
                Some(Action::Release(self.leases.all(), true))
            }
            Stage::Stopping => {
                self.stage = Stage::Stopped;
                Some(Action::Stop)
            }
            _ => None,
        }
    }

    fn closed(&mut self, now: Time) {
        // What the broker had is answered or purged: nothing can be appended any more by us.
        let open: Vec<u64> = self.batches.keys().copied().collect();
        for batch in open {
            self.publish_ended(batch, now);
        }
        if let Stage::Closing(_) = self.stage {
            // Settlements that fail are repeated for a while, then left: their rows are published
            // again by the next owner.
            self.stage = Stage::Settling(now + self.settings.statement_deadline * 2);
        }
    }

    fn is_done(&self) -> bool {
        self.checked && self.leases.all_served() && (self.leases.len() == 0 || self.is_idle())
    }
}
