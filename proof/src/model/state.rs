//! One state of the model: the table, the log, and the shipped machines with what is under way.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use outbox_core::broker::{Outcome, PublishErrorKind};
use outbox_core::delivery::{Failure, Receipt, RowId, RowState, Settlement};
use outbox_core::machine::{
    Action, ClaimOrder, Input, KeepOrder, Machine, Settings, SettleOrder, Time,
};
use outbox_core::store::{
    Backlog, ClaimReply, KeepLeases, LaneRecord, Release, Settled, Standing, StoreErrorKind,
    StoreProfile, Swept, Watched,
};
use outbox_core::{Delivery, Lane, LeaseTable, Message, MessageId, Position, WorkerId};

use super::{Setup, Step};

/// How long a worker stands still: just past its lease, and past the time at which another one takes
/// its lane.
pub(super) const PAUSES: [Duration; 2] = [Duration::from_secs(46), Duration::from_secs(120)];

pub(super) const TOPIC: &str = "orders";
const LANE: Lane = Lane(0);

/// Whose message a row is: the ordered key's, or another's.
pub(super) type Name = u8;

#[derive(Debug, Clone)]
pub struct State {
    pub(super) now: Time,
    pub(super) rows: BTreeMap<u64, Row>,
    next_id: u64,
    started: u8,
    /// Steps that each writer has done.
    pub(super) written: Vec<usize>,
    pub(super) committed: BTreeSet<Name>,
    leases: Vec<LeaseTable>,
    pub(super) log: Vec<Name>,
    /// The message that the broker rejects until an operator has mended it.
    pub(super) poison: Option<Name>,
    pub(super) workers: Vec<Option<Worker>>,
    pub(super) faults: u8,
    pub(super) pauses: u8,
    pub(super) crashed: bool,
    pub(super) lost_answer: bool,
    pub(super) took_over: bool,
    pub(super) late_row: bool,
    pub(super) woke_with_its_lane: bool,
    pub(super) woke_without_its_lane: bool,
    /// What must never be.
    pub(super) wrong: BTreeSet<&'static str>,
}

#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) name: Name,
    pub(super) committed: bool,
    pub(super) state: RowState,
}

#[derive(Debug, Clone)]
pub(super) struct Worker {
    me: WorkerId,
    machine: Machine,
    pub(super) claim: Option<Reading>,
    /// Handed to the client, not yet in the log: in the order of the batch.
    pub(super) sends: Vec<Send>,
    /// Decided by the broker, the answer is on its way.
    pub(super) answers: Vec<(Send, Verdict)>,
    pub(super) settles: Vec<(u64, Arc<SettleOrder>, Option<Settled>)>,
    acknowledged: BTreeSet<Name>,
    /// It stands still until then.
    stands_until: Option<Time>,
}

/// A claim has two snapshots, then an answer.
#[derive(Debug, Clone)]
pub(super) struct Reading {
    order: Arc<ClaimOrder>,
    reply: Option<ClaimReply>,
    pub(super) both: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Send {
    batch: u64,
    index: usize,
    pub(super) name: Name,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Verdict {
    Delivered,
    Rejected,
}

impl State {
    pub(super) fn new(setup: &Setup) -> Self {
        let lanes = NonZeroU16::MIN;
        let tables = if setup.everybody_owns { setup.workers } else { 1 };
        let mut state = Self {
            now: Time::ZERO,
            rows: BTreeMap::new(),
            next_id: 1,
            started: 0,
            written: vec![0; setup.writers.len()],
            committed: BTreeSet::new(),
            leases: vec![LeaseTable::new(lanes); tables],
            log: Vec::new(),
            poison: setup.poison,
            workers: vec![None; setup.workers],
            faults: setup.faults,
            pauses: setup.pauses,
            crashed: false,
            lost_answer: false,
            took_over: false,
            late_row: false,
            woke_with_its_lane: false,
            woke_without_its_lane: false,
            wrong: BTreeSet::new(),
        };
        for index in 0..setup.workers {
            state.start(index);
        }
        state
    }

    fn start(&mut self, index: usize) {
        self.started += 1;
        let me = WorkerId::from_bytes([self.started; 16]);
        let mut settings = Settings::default();
        settings.worker = me;
        settings.settle_linger = Duration::ZERO;
        settings.settle_rows = 2;
        settings.page_rows = 4;
        // Few moments at which anything happens: the order of events matters, not their times.
        let poll = Duration::from_secs(10);
        settings.poll_shortest = poll;
        settings.poll_busiest = poll;
        settings.poll_longest = poll;
        settings.watch_every = Duration::from_secs(20);
        settings.scan_every = Duration::from_secs(3_000);
        settings.count_every = Duration::from_secs(3_000);
        let machine = Machine::new(settings, StoreProfile::new(NonZeroU16::MIN), self.now);
        self.workers[index] = Some(Worker {
            me,
            machine,
            claim: None,
            sends: Vec::new(),
            answers: Vec::new(),
            settles: Vec::new(),
            acknowledged: BTreeSet::new(),
            stands_until: None,
        });
        self.act(index);
    }

    // ---- the writers and the operator ----------------------------------------------------------

    /// The next step of a writer: a row is inserted, or committed.
    pub(super) fn write(&mut self, setup: &Setup, writer: usize) {
        let step = self.written[writer];
        self.written[writer] += 1;
        let name = setup.writers[writer][step / 2];
        if step.is_multiple_of(2) {
            let row = Row { name, committed: false, state: RowState::default() };
            self.rows.insert(self.next_id, row);
            self.next_id += 1;
            return;
        }
        self.committed.insert(name);
        let above = self.rows.iter().rev().find(|(_, row)| row.committed).map(|(id, _)| *id);
        for (id, row) in self.rows.iter_mut().filter(|(_, row)| row.name == name) {
            row.committed = true;
            self.late_row |= above.is_some_and(|above| above > *id);
        }
    }

    /// An operator mends what the broker rejected, and has the held row tried again.
    pub(super) fn mend(&mut self) {
        self.poison = None;
        for row in self.rows.values_mut().filter(|row| row.state.held) {
            row.state = RowState::new(0, row.state.revision + 1);
        }
    }

    // ---- the machines --------------------------------------------------------------------------

    pub(super) fn crash(&mut self, index: usize) {
        self.crashed = true;
        self.start(index);
    }

    fn tell(&mut self, index: usize, input: Input) {
        if let Some(worker) = &mut self.workers[index] {
            worker.machine.handle(input, self.now);
            self.act(index);
        }
    }

    pub(super) fn stand(&mut self, index: usize, long: Duration) {
        self.pauses -= 1;
        let until = self.now + long;
        self.with(index, |worker| worker.stands_until = Some(until));
    }

    /// Time passes to the next moment at which a machine wants something, or a worker goes on.
    pub(super) fn next_moment(&self) -> Time {
        let moments =
            self.workers.iter().flatten().map(|worker| {
                worker.stands_until.unwrap_or_else(|| worker.machine.wake_at(self.now))
            });
        moments.min().unwrap_or(self.now)
    }

    pub(super) fn pass_time(&mut self) {
        self.now = self.next_moment();
        for index in 0..self.workers.len() {
            self.wake(index);
            self.act(index);
        }
    }

    /// A worker that has stood still for long enough goes on.
    fn wake(&mut self, index: usize) {
        let Some(worker) = &mut self.workers[index] else { return };
        if worker.stands_until.is_some_and(|until| until <= self.now) {
            worker.stands_until = None;
            let me = worker.me;
            let in_its_name = self.lane(index).owner == Some(me);
            self.woke_with_its_lane |= in_its_name;
            self.woke_without_its_lane |= !in_its_name;
        }
    }

    fn act(&mut self, index: usize) {
        loop {
            let Some(worker) = &mut self.workers[index] else { return };
            if worker.stands() {
                return;
            }
            let Some(action) = worker.machine.poll(self.now) else { break };
            self.perform(index, action);
        }
        if let Some(worker) = &mut self.workers[index] {
            worker.machine.take_events();
        }
    }

    /// What the model does not take apart happens at once; everything else becomes under way.
    fn perform(&mut self, index: usize, action: Action) {
        let now = self.now;
        let input = match action {
            Action::Keep(order) => {
                let Some(standing) = self.keep(index, &order) else { return };
                Input::Kept(Ok(standing))
            }
            Action::Release(leases, _) => {
                let Some(me) = self.workers[index].as_ref().map(|worker| worker.me) else { return };
                self.table(index).release(&Release::new(me, &leases), now);
                Input::Released(Ok(()))
            }
            Action::Check => Input::Checked(Ok(())),
            Action::Count => Input::Counted(Ok(Backlog::default())),
            Action::Purge(_) => Input::Purged(Ok(0)),
            Action::Close(_) => Input::Closed,
            Action::Claim(order) => {
                let reading = Reading { order, reply: None, both: false };
                return self.with(index, |worker| worker.claim = Some(reading));
            }
            Action::Publish(batch, all) => return self.publish(index, batch, &all),
            Action::Settle(number, order) => {
                return self.with(index, |worker| worker.settles.push((number, order, None)));
            }
            _ => return,
        };
        if let Some(worker) = &mut self.workers[index] {
            worker.machine.handle(input, now);
        }
    }

    fn with(&mut self, index: usize, change: impl FnOnce(&mut Worker)) {
        if let Some(worker) = &mut self.workers[index] {
            change(worker);
        }
    }

    fn publish(&mut self, index: usize, batch: u64, all: &[(Box<Delivery>, Time)]) {
        let lane = self.lane(index);
        let Some(worker) = &mut self.workers[index] else { return };
        if lane.owner != Some(worker.me) || lane.expired {
            self.wrong.insert("a worker sent what is not its own");
        }
        for (index, (delivery, _)) in all.iter().enumerate() {
            let name = name_of(delivery.message.id());
            if worker.acknowledged.contains(&name) {
                self.wrong.insert("a worker sent what was acknowledged to it");
            }
            if delivery.state.held {
                self.wrong.insert("a held message was sent");
            }
            worker.sends.push(Send { batch, index, name });
        }
    }

    // ---- the store -----------------------------------------------------------------------------

    fn table(&mut self, index: usize) -> &mut LeaseTable {
        let index = index % self.leases.len();
        &mut self.leases[index]
    }

    /// How the lane stands, as a stranger would see it.
    fn lane(&self, index: usize) -> LaneRecord {
        let mut table = self.leases[index % self.leases.len()].clone();
        let stranger = KeepLeases::new(WorkerId::from_bytes([u8::MAX; 16]), Duration::ZERO);
        table.keep(&stranger, self.now).lanes.remove(0)
    }

    fn keep(&mut self, index: usize, order: &KeepOrder) -> Option<Standing> {
        let (me, now) = (self.workers[index].as_ref()?.me, self.now);
        let request = KeepLeases::new(me, Settings::default().lease).healthy(order.healthy);
        let request = request.renew(&order.renew).take(&order.take);
        let standing = self.table(index).keep(&request, now);
        let taken = standing.lanes.iter().any(|lane| lane.owner == Some(me) && lane.epoch > 1);
        self.took_over |= taken && !order.take.is_empty();
        Some(standing)
    }

    /// The next snapshot of a claim, or its answer.
    pub(super) fn read(&mut self, index: usize) {
        let Some(reading) = self.workers[index].as_mut().and_then(|w| w.claim.take()) else {
            return;
        };
        let Reading { order, reply, both } = reading;
        let next = match reply {
            None => Reading { reply: Some(self.page(&order)), order, both: false },
            Some(mut reply) if !both => {
                self.rest(&order, &mut reply);
                Reading { order, reply: Some(reply), both: true }
            }
            Some(reply) => return self.tell(index, Input::Claimed(Ok(reply))),
        };
        self.with(index, |worker| worker.claim = Some(next));
    }

    /// The claim's answer is lost.
    pub(super) fn lose_claim(&mut self, index: usize) {
        self.with(index, |worker| worker.claim = None);
        self.tell(index, Input::Claimed(Err(StoreErrorKind::Unavailable)));
    }

    fn visible(&self) -> impl Iterator<Item = (Position, &Row)> {
        let rows = self.rows.iter().filter(|(_, row)| row.committed);
        rows.map(|(id, row)| (Position(*id), row))
    }

    fn page(&self, order: &ClaimOrder) -> ClaimReply {
        let claim = order.request();
        let mut reply = ClaimReply::default();
        let newest = self.visible().map(|(position, _)| position).max();
        reply.newest =
            newest.filter(|position| claim.newest.is_some_and(|above| *position > above));
        let Some(page) = claim.page else { return reply };
        reply.covered = page.after;
        reply.end = true;
        let inside = self.visible().filter(|(at, _)| *at > page.after && *at <= page.through);
        for (count, (position, row)) in inside.enumerate() {
            if count >= page.rows {
                reply.end = false;
                break;
            }
            reply.covered = position;
            reply.rows.push(delivery(position, row).into());
        }
        reply
    }

    fn rest(&self, order: &ClaimOrder, reply: &mut ClaimReply) {
        let claim = order.request();
        for (position, row) in self.visible() {
            if claim.sweep.iter().any(|span| span.contains(position)) {
                reply.swept.push(Swept::new(position, LANE, 1));
            }
            if claim.watch.contains(&position) {
                let id = RowId::new(position, id_of(row.name));
                reply.watched.push(Watched::new(id, row.state));
            }
            if claim.fetch.contains(&position) {
                reply.rows.push(delivery(position, row).into());
            }
        }
        for id in self.rows.keys().map(|id| Position(*id)) {
            if claim.open.iter().any(|span| span.contains(id)) {
                reply.open.push(id);
            }
        }
    }

    /// A settle takes effect, or its answer comes.
    pub(super) fn settle(&mut self, index: usize, which: usize) {
        let Some(worker) = &mut self.workers[index] else { return };
        let (number, order, done) = worker.settles.remove(which);
        if let Some(settled) = done {
            return self.tell(index, Input::Settled(number, Ok(settled)));
        }
        let settled = self.apply(index, &order);
        self.with(index, |worker| worker.settles.insert(which, (number, order, Some(settled))));
    }

    /// A settle's request or its answer is lost: the commit is ambiguous.
    pub(super) fn lose_settle(&mut self, index: usize, which: usize) {
        let Some(worker) = &mut self.workers[index] else { return };
        let (number, ..) = worker.settles.remove(which);
        self.tell(index, Input::Settled(number, Err(StoreErrorKind::Unavailable)));
    }

    fn apply(&mut self, index: usize, order: &SettleOrder) -> Settled {
        let settle = order.request();
        for delivered in settle.delivered {
            let id = delivered.id.position.0;
            let same = |row: &&Row| id_of(row.name) == delivered.id.message;
            if let Some(row) = self.rows.get(&id).filter(same) {
                if !self.log.contains(&row.name) {
                    self.wrong.insert("a row went away before its message appeared");
                }
                self.rows.remove(&id);
            }
        }
        let mut refused = Vec::new();
        for failed in settle.failed {
            let current = self.table(index).is_current(&failed.lease);
            let row = self.rows.get_mut(&failed.id.position.0).filter(|row| {
                current
                    && id_of(row.name) == failed.id.message
                    && row.state.attempts == failed.read.attempts
                    && row.state.revision == failed.read.revision
            });
            match row {
                None => refused.push(failed.id.position),
                Some(row) => {
                    row.state.attempts = failed.attempts;
                    row.state.held = failed.settlement == Settlement::Held;
                }
            }
        }
        Settled::refusing(refused)
    }

    // ---- the broker ----------------------------------------------------------------------------

    /// The broker decides about a message: it enters the log, or is rejected.
    pub(super) fn decide(&mut self, index: usize, which: usize) {
        let Some(worker) = &mut self.workers[index] else { return };
        let send = worker.sends.remove(which);
        let rejected = self.poison == Some(send.name);
        let verdict = if rejected { Verdict::Rejected } else { Verdict::Delivered };
        worker.answers.push((send, verdict));
        if !rejected {
            if !self.committed.contains(&send.name) {
                self.wrong.insert("a message appeared that was not committed");
            }
            self.log.push(send.name);
        }
    }

    /// The broker's answer comes, or is lost.
    pub(super) fn answer(&mut self, index: usize, which: usize, lost: bool) {
        let Some(worker) = &mut self.workers[index] else { return };
        let (send, verdict) = worker.answers.remove(which);
        let failed = |kind| Outcome::Failed(kind, Failure::new("model", ""));
        let outcome = match verdict {
            _ if lost => failed(PublishErrorKind::Unknown),
            Verdict::Rejected => failed(PublishErrorKind::Rejected),
            Verdict::Delivered => {
                worker.acknowledged.insert(send.name);
                Outcome::Delivered(Receipt::default())
            }
        };
        self.lost_answer |= lost;
        self.tell(index, Input::Answered(send.batch, vec![(send.index, outcome)]));
    }

    /// A message is lost on its way, and nobody can tell.
    pub(super) fn lose_send(&mut self, index: usize, which: usize) {
        let Some(worker) = &mut self.workers[index] else { return };
        let send = worker.sends.remove(which);
        let outcome = Outcome::Failed(PublishErrorKind::Unknown, Failure::new("model", ""));
        self.tell(index, Input::Answered(send.batch, vec![(send.index, outcome)]));
    }
}

fn id_of(name: Name) -> MessageId {
    MessageId::from_bytes([name; 16])
}

fn name_of(id: MessageId) -> Name {
    id.as_bytes()[0]
}

fn delivery(position: Position, row: &Row) -> Delivery {
    let key = if row.name < super::OTHERS { "ordered" } else { "other" };
    let message = Message::builder(TOPIC).id(id_of(row.name)).key(key).payload("").build();
    Delivery::new(position, LANE, message.expect("the message is valid")).with_state(row.state)
}

impl Hash for State {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.now, self.next_id, self.faults, &self.written, &self.log).hash(state);
        (&self.committed, self.poison, self.crashed, self.lost_answer).hash(state);
        (self.took_over, self.late_row, &self.wrong, self.pauses).hash(state);
        (self.woke_with_its_lane, self.woke_without_its_lane).hash(state);
        for table in &self.leases {
            table.encode().hash(state);
        }
        for (id, row) in &self.rows {
            (id, row.name, row.committed, row.state.held).hash(state);
            (row.state.attempts, row.state.revision).hash(state);
        }
        for worker in &self.workers {
            worker.as_ref().map(|worker| worker.fingerprint()).hash(state);
        }
    }
}

impl Worker {
    pub(super) fn stands(&self) -> bool {
        self.stands_until.is_some()
    }

    /// What happens to a worker's own though it stands still: whatever does not need it to listen.
    pub(super) fn goes_on_without_it(&self, index: usize, steps: &mut Vec<Step>) {
        if self.claim.as_ref().is_some_and(|reading| !reading.both) {
            steps.push(Step::Read(index));
        }
        steps.extend((0..self.sends.len()).map(|which| Step::Decide(index, which)));
        for (which, (_, _, done)) in self.settles.iter().enumerate() {
            steps.extend(done.is_none().then_some(Step::Settle(index, which)));
        }
    }

    fn fingerprint(&self) -> impl Hash {
        // The orders that are out are the machine's own, and part of its fingerprint.
        let reading = self.claim.as_ref().map(|reading| (&reading.reply, reading.both));
        let settles: Vec<_> = self.settles.iter().map(|(number, _, done)| (number, done)).collect();
        let known: Vec<Name> = self.acknowledged.iter().copied().collect();
        let open = format!("{reading:?}{settles:?}{:?}", self.stands_until);
        (self.machine.fingerprint(), open, self.sends.clone(), self.answers.clone(), known)
    }
}

impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        let hash = |state: &Self| {
            let mut hasher = std::hash::DefaultHasher::new();
            state.hash(&mut hasher);
            hasher.finish()
        };
        hash(self) == hash(other)
    }
}
