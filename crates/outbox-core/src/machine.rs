//! The dispatcher's decisions: a synchronous machine without I/O.
//!
//! It takes inputs (leases kept, rows claimed, answers, settlements, time) with the current time
//! and answers with actions; the tokio shell only performs them. The same machine runs under the
//! deterministic simulation. It is public for that purpose: this module is not covered by semantic
//! versioning.

mod ahead;
mod circuit;
mod claiming;
mod fingerprint;
mod horizon;
mod keys;
mod leasing;
mod pace;
mod publishing;
mod settling;
mod topics;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use self::circuit::Circuit;
use self::claiming::{CatchUp, LaneRows};
use self::horizon::Horizon;
use self::keys::{Key, KeyId, Map};
use self::leasing::Leases;
use self::pace::Pace;
use self::publishing::Batch;
use self::settling::{Fading, Unsettled};
use self::topics::{TopicId, Topics};
use crate::broker::{Outcome, PublishErrorKind};
use crate::delivery::{Delivery, Failure, Lane, Lease, Position, RowState, Span, WorkerId};
use crate::message::MessageId;
use crate::observe::{Event, Step};
use crate::retry::{Retention, RetryPolicy, TopicPolicy};
use crate::seeded::seeded;
use crate::status::{Health, Status};
use crate::store::{
    Backlog, Claim, ClaimReply, Delivered, Failed, Page, Purge, Settle, Settled, Standing,
    StoreErrorKind, StoreProfile, TakeOver,
};
use crate::wake::Urgency;

/// Time since a fixed moment, on a clock that never goes back.
pub type Time = Duration;

/// Everything the machine decides by. Built and checked by the dispatcher's builder.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Settings {
    /// Who this worker is.
    pub worker: WorkerId,
    /// How long a lease lasts.
    pub lease: Duration,
    /// How often leases are kept.
    pub keep_every: Duration,
    /// The longest time a call to the store may take.
    pub statement_deadline: Duration,
    /// What is left between the last possible outcome and the lease's end.
    pub margin: Duration,
    /// The longest time a publish can stay undecided.
    pub undecided: Duration,
    /// For how long an id that was never seen is swept.
    pub grace: Duration,
    /// Rows published and not yet confirmed settled.
    pub rows_in_flight: usize,
    /// Bytes of content held in memory.
    pub bytes_in_flight: usize,
    /// Rows of one page.
    pub page_rows: usize,
    /// Rows of a key that are kept with content while the first one is outstanding.
    pub key_buffer: usize,
    /// Messages of one key that may be outstanding.
    pub in_key_window: usize,
    /// Rows known at most, most of them as ids only.
    pub known_rows: usize,
    /// Rows of one settle.
    pub settle_rows: usize,
    /// How long an acknowledged row waits for others to be settled with.
    pub settle_linger: Duration,
    /// Settles at the same time.
    pub settles: usize,
    /// The shortest interval between pages.
    pub poll_shortest: Duration,
    /// The interval between pages under full load.
    pub poll_busiest: Duration,
    /// The interval between pages when nothing comes.
    pub poll_longest: Duration,
    /// When failed messages are tried again.
    pub retry: RetryPolicy,
    /// Policies by topic.
    pub topics: HashMap<String, TopicPolicy>,
    /// What becomes of delivered rows.
    pub retention: Retention,
    /// How often heads of parked and held keys are read again.
    pub watch_every: Duration,
    /// How often the net that looks for rows no rule foresaw takes a step.
    pub scan_every: Duration,
    /// How often the backlog is counted.
    pub count_every: Duration,
    /// How long a shutdown waits for outcomes.
    pub drain_limit: Duration,
    /// Stop once everything that can be delivered is delivered.
    pub until_empty: bool,
    /// Seed of the jitter.
    pub seed: u64,
}

impl Default for Settings {
    /// The documented defaults: see `DispatcherBuilder`.
    fn default() -> Self {
        Self {
            worker: WorkerId::generate(),
            lease: Duration::from_secs(45),
            keep_every: Duration::from_secs(5),
            statement_deadline: Duration::from_secs(5),
            margin: Duration::from_secs(2),
            undecided: Duration::from_secs(20),
            grace: Duration::from_secs(10),
            rows_in_flight: 20_000,
            bytes_in_flight: 64 << 20,
            page_rows: 4_000,
            key_buffer: 64,
            in_key_window: 1,
            known_rows: 1_000_000,
            settle_rows: 900,
            settle_linger: Duration::from_millis(20),
            settles: 2,
            poll_shortest: Duration::from_millis(1),
            poll_busiest: Duration::from_millis(50),
            poll_longest: Duration::from_millis(300),
            retry: RetryPolicy::default(),
            topics: HashMap::new(),
            retention: Retention::Delete,
            watch_every: Duration::from_secs(2),
            scan_every: Duration::from_secs(5),
            count_every: Duration::from_secs(15),
            drain_limit: Duration::from_secs(25),
            until_empty: false,
            seed: 0,
        }
    }
}

impl Settings {
    /// Sets the lease and everything that follows from it: it is kept nine times, a statement may
    /// take a ninth of it, the margin is a twentieth.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self.keep_every = lease / 9;
        self.statement_deadline = lease / 9;
        self.margin = lease / 20;
        self
    }

    /// The shortest lease under which a worker can publish without gaps: an outcome may take
    /// `undecided`, and two keeps and a statement may pass before a renewal counts.
    pub fn shortest_lease(&self) -> Duration {
        let ours = self.margin + self.keep_every * 2 + self.statement_deadline;
        self.undecided.saturating_add(ours)
    }
}

/// Something that happened.
#[derive(Debug)]
#[non_exhaustive]
pub enum Input {
    /// A keep was answered.
    Kept(Result<Standing, StoreErrorKind>),
    /// A claim was answered.
    Claimed(Result<ClaimReply, StoreErrorKind>),
    /// Messages of a batch were answered, by index.
    Answered(u64, Vec<(usize, Outcome)>),
    /// A publish ended: what was not answered is unknown.
    PublishEnded(u64),
    /// A settle was answered.
    Settled(u64, Result<Settled, StoreErrorKind>),
    /// A release was answered.
    Released(Result<(), StoreErrorKind>),
    /// The broker was checked.
    Checked(Result<(), PublishErrorKind>),
    /// A purge was answered.
    Purged(Result<u64, StoreErrorKind>),
    /// The backlog was counted.
    Counted(Result<Backlog, StoreErrorKind>),
    /// The broker was closed.
    Closed,
    /// A writer of this process added or committed something.
    Rung(Urgency),
    /// The user wants the dispatcher to stop.
    ShutDown,
}

/// Something to do. At most one keep, claim, release and chore is out at a time.
#[derive(Debug)]
#[non_exhaustive]
pub enum Action {
    /// Keep leases.
    Keep(KeepOrder),
    /// Read rows.
    Claim(Arc<ClaimOrder>),
    /// Publish a batch, each message no later than its time.
    Publish(u64, Vec<(Box<Delivery>, Time)>),
    /// Settle rows.
    Settle(u64, Arc<SettleOrder>),
    /// Give leases back; `true` when the worker leaves.
    Release(Vec<Lease>, bool),
    /// Check the broker.
    Check,
    /// Purge the archive.
    Purge(Purge),
    /// Count the backlog.
    Count,
    /// Close the broker within this time.
    Close(Duration),
    /// Stop: everything is done.
    Stop,
}

/// A keep, as owned values.
#[derive(Debug, Clone)]
pub struct KeepOrder {
    /// Whether this worker makes progress.
    pub healthy: bool,
    /// The leases to renew.
    pub renew: Vec<Lease>,
    /// The lanes to take.
    pub take: Vec<TakeOver>,
}

/// A claim, as owned values.
#[derive(Debug, Default)]
pub struct ClaimOrder {
    lanes: Vec<Lane>,
    page: Option<PageOrder>,
    sweep: Vec<Span>,
    newest: Option<Position>,
    open: Vec<Span>,
    fetch: Vec<Position>,
    watch: Vec<Position>,
    scan: Option<PageOrder>,
    bytes: usize,
}

#[derive(Debug, Clone)]
struct PageOrder {
    lanes: Vec<Lane>,
    after: Position,
    through: Position,
    rows: usize,
    catch_up: bool,
}

impl PageOrder {
    fn request(&self) -> Page<'_> {
        let page = Page::new(&self.lanes, self.after, self.rows);
        if self.through == Position(u64::MAX) { page } else { page.through(self.through) }
    }
}

impl ClaimOrder {
    /// The claim as the store takes it.
    pub fn request(&self) -> Claim<'_> {
        let mut claim = Claim::new(self.bytes)
            .sweep(&self.sweep)
            .newest(self.newest)
            .open(&self.open)
            .fetch(&self.fetch)
            .watch(&self.watch);
        if let Some(page) = &self.page {
            claim = claim.page(page.request());
        }
        if let Some(scan) = &self.scan {
            claim = claim.scan(scan.request());
        }
        claim
    }
}

/// A settle, as owned values.
#[derive(Debug, Clone, Default)]
pub struct SettleOrder {
    delivered: Vec<Delivered>,
    failed: Vec<Failed>,
    archive: bool,
    repeated: bool,
}

impl SettleOrder {
    /// The settle as the store takes it.
    pub fn request(&self) -> Settle<'_> {
        let settle = Settle::new(&self.delivered, &self.failed).archive(self.archive);
        settle.repeated(self.repeated)
    }
}

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
        let topics = Topics::new(settings.topics.clone(), settings.rows_in_flight / 2);
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
        let closed = self.topics.ids().map(|id| self.topics.get(id)).filter(|t| t.is_closed());
        Status {
            health: self.health(now),
            lanes: self.leases.len(),
            in_flight: self.in_flight(),
            content_bytes: self.loaded_bytes,
            known: self.rows.len() + self.lanes.values().map(LaneRows::unread_count).sum::<usize>(),
            held_keys: self.watched.len(),
            closed_topics: closed.map(|topic| Arc::clone(&topic.name)).collect(),
            backlog: self.backlog,
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
            self.claim_failing = None;
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

    // ---- leases --------------------------------------------------------------------------------

    fn next_keep(&mut self, now: Time) -> Option<Action> {
        let leaving = !matches!(
            self.stage,
            Stage::Running | Stage::Draining(_) | Stage::Closing(_) | Stage::Settling(_)
        );
        if self.keeping.is_some() || self.releasing || leaving || self.keep_at > now {
            return None;
        }
        let healthy = self.is_healthy(now);
        let take = self.leases.take_overs(now, healthy);
        let order = KeepOrder { healthy, renew: self.leases.renewals(), take };
        self.keeping = Some((order.clone(), now));
        Some(Action::Keep(order))
    }

    fn kept(&mut self, result: Result<Standing, StoreErrorKind>, now: Time) {
        let Some((order, sent)) = self.keeping.take() else { return };
        let standing = match result {
            Ok(standing) => standing,
            Err(kind) => {
                self.keep_failing.get_or_insert(now);
                self.keep_at = now + self.settings.keep_every.min(Duration::from_secs(1));
                return self.store_failed(Step::Keep, kind);
            }
        };
        self.keep_failing = None;
        self.meet_server(standing.server, now);
        let changes = self.leases.apply(standing, &order.renew, &order.take, sent, now);
        self.lose(changes.lost, now);
        self.gain(changes.gained, now);
        if self.stage == Stage::Running {
            let healthy = self.is_healthy(now);
            self.leases.hand_over(now, healthy);
            let kept = self.leases.keep_on();
            if !seeded!("no-catch-up-after-a-hand-over") {
                self.fresh_lanes.extend(kept);
            }
        }
        for key in std::mem::take(&mut self.stalled_by_lane) {
            self.place(key, now);
        }
        if !self.checked && !self.leases.has_peer() {
            self.check_at = self.check_at.min(now);
        }
        let more = !self.leases.take_overs(now, self.is_healthy(now)).is_empty()
            || self.leases.renewals().len() > self.leases.len();
        let every = self.settings.keep_every;
        self.keep_at = if more {
            now + Duration::from_millis(1)
        } else if self.leases.alone() {
            now + every
        } else {
            now + every.min(Duration::from_secs(1))
        };
    }

    /// Another server has other ids and other transactions: everything read before is void.
    fn meet_server(&mut self, server: u64, now: Time) {
        let known = self.server.replace(server);
        if known.is_some_and(|known| known != server) {
            self.tell(Event::ServerChanged);
            self.start_over(now);
        }
    }

    fn start_over(&mut self, now: Time) {
        if let Some(claim) = &mut self.claiming {
            claim.void = true;
        }
        self.horizon = Horizon::default();
        self.catch_up = None;
        self.fresh_lanes.clear();
        self.scan_after = Position::START;
        self.caught_up = false;
        let lanes: Vec<Lane> = self.leases.iter().map(|(lane, _)| lane).collect();
        for lane in lanes {
            self.forget_lane(lane, now);
            self.lanes.insert(lane, LaneRows::default());
        }
        self.pace.hurry(now);
    }

    fn gain(&mut self, gained: Vec<Lane>, now: Time) {
        if gained.is_empty() {
            return;
        }
        if self.lanes.is_empty() && self.claiming.is_none() {
            // No page was read for anybody: everything is read from the start.
            self.horizon = Horizon::default();
            self.catch_up = None;
            self.fresh_lanes.clear();
        } else {
            self.fresh_lanes.extend(gained.iter().filter(|_| !seeded!("no-catch-up")));
        }
        for lane in &gained {
            self.lanes.insert(*lane, LaneRows::default());
        }
        self.caught_up = false;
        self.pace.hurry(now);
        self.last_progress = now;
        self.tell(Event::LanesGained { lanes: gained });
    }

    fn lose(&mut self, lost: Vec<Lane>, now: Time) {
        if lost.is_empty() {
            return;
        }
        for lane in &lost {
            self.forget_lane(*lane, now);
            self.lanes.remove(lane);
        }
        self.tell(Event::LanesLost { lanes: lost });
    }

    /// Forgets the rows of a lane, except those at the broker and those that were acknowledged:
    /// their answers and their settlements still count.
    fn forget_lane(&mut self, lane: Lane, now: Time) {
        self.fresh_lanes.retain(|fresh| *fresh != lane);
        if let Some(catch_up) = &mut self.catch_up {
            catch_up.lanes.retain(|other| *other != lane);
            if catch_up.lanes.is_empty() {
                self.catch_up = None;
            }
        }
        let mut gone: Vec<Position> = self
            .rows
            .iter()
            .filter(|(_, row)| {
                row.lane == lane && !matches!(row.phase, Phase::Offered | Phase::Acknowledged)
            })
            .map(|(position, _)| *position)
            .collect();
        gone.sort_unstable();
        for position in gone {
            self.drop_row(position, now);
        }
        if let Some(rows) = self.lanes.get_mut(&lane) {
            *rows = LaneRows::default();
        }
    }

    fn next_release(&mut self, now: Time) -> Option<Action> {
        if self.keeping.is_some() || self.releasing {
            return None;
        }
        let patience = self.settings.lease / 3;
        let mut leases = Vec::new();
        for (lane, held) in self.leases.iter() {
            let Some(since) = held.draining else { continue };
            let waited = now.saturating_sub(since) >= patience;
            let busy = self.batches.values().any(|batch| batch.has_lane(lane));
            let idle = !busy && (waited || !self.unsettled.has_lane(lane));
            if idle || seeded!("hand-over-without-draining") {
                leases.push(Lease::new(lane, held.epoch));
            }
        }
        if leases.is_empty() {
            return None;
        }
        for lease in &leases {
            self.leases.remove(lease.lane);
            self.forget_lane(lease.lane, now);
            self.lanes.remove(&lease.lane);
        }
        self.tell(Event::LanesReleased { lanes: leases.iter().map(|lease| lease.lane).collect() });
        if self.leases.len() == 0 && !self.is_healthy(now) {
            self.given_up = self.given_up.saturating_add(1);
        }
        self.releasing = true;
        Some(Action::Release(leases, false))
    }

    fn released(&mut self, result: Result<(), StoreErrorKind>) {
        self.releasing = false;
        if self.stage == Stage::Releasing {
            self.stage = Stage::Stopping;
        }
        if let Err(kind) = result {
            // They expire by themselves.
            self.store_failed(Step::Release, kind);
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
        self.check_at = now + Duration::from_secs(1);
        if self.leases.len() > 0 {
            // Whether messages arrive is what counts; a check tells how many may try.
            self.circuit.checked(result.is_ok());
            self.checked |= result.is_ok();
            return;
        }
        self.checked = result.is_ok();
        if self.checked {
            self.keep_at = self.keep_at.min(now);
            if let Some(since) = self.circuit.close() {
                self.tell(Event::CircuitClosed { after: now.saturating_sub(since) });
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
        self.count_at = now + self.settings.count_every;
        match result {
            Ok(backlog) => {
                self.backlog = Some(backlog);
                self.tell(Event::BacklogSampled { backlog });
            }
            Err(kind) => self.store_failed(Step::Backlog, kind),
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
