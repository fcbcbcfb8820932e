//! The simulated store: what an SQL database does, as plain data.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;
use std::time::Duration;

use outbox_core::delivery::{RowId, RowState, Settlement};
use outbox_core::store::{
    Claim, ClaimReply, Claimed, KeepLeases, Page, Release, Settle, Settled, Standing, Swept,
    Watched,
};
use outbox_core::{Delivery, Lane, LeaseTable, Message, MessageId, Position, WorkerId};

#[derive(Debug)]
pub(super) struct Database {
    pub(super) rows: BTreeMap<u64, Row>,
    pub(super) dead: BTreeSet<MessageId>,
    next_id: u64,
    leases: LeaseTable,
    /// Until when each worker was given a lane, on the world's clock.
    granted: BTreeMap<(WorkerId, Lane), Duration>,
    /// How far the store's clock is ahead of the world's.
    pub(super) clock: Duration,
    pub(super) server: u64,
}

#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) message: Message,
    pub(super) lane: Lane,
    pub(super) visibility: Visibility,
    pub(super) state: RowState,
    pub(super) due: Duration,
    pub(super) added: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Visibility {
    /// The id is handed out, the row is not written yet: nobody can see it.
    Allocated,
    /// Written, not committed.
    Open,
    Committed,
}

impl Database {
    pub(super) fn new(lanes: NonZeroU16) -> Self {
        Self {
            rows: BTreeMap::new(),
            dead: BTreeSet::new(),
            next_id: 1,
            leases: LeaseTable::new(lanes),
            granted: BTreeMap::new(),
            clock: Duration::from_secs(3_600),
            server: 1,
        }
    }

    pub(super) fn insert(&mut self, message: Message, lane: Lane, now: Duration) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let state = RowState::default();
        let visibility = Visibility::Allocated;
        self.rows.insert(
            id,
            Row { message, lane, visibility, state, due: Duration::ZERO, added: self.clock + now },
        );
        id
    }

    /// Skips ids, as a restart of the server may.
    pub(super) fn skip_ids(&mut self, count: u64) {
        self.next_id += count;
    }

    fn now(&self, now: Duration) -> Duration {
        now + self.clock
    }

    pub(super) fn keep(&mut self, request: &KeepLeases<'_>, now: Duration) -> Standing {
        let mut standing = self.leases.keep(request, self.now(now));
        standing.server = self.server;
        let asked = request.renew.iter().map(|lease| lease.lane);
        let asked: BTreeSet<Lane> =
            asked.chain(request.take.iter().map(|take| take.lane)).collect();
        for record in &standing.lanes {
            if record.owner == Some(request.worker) && asked.contains(&record.lane) {
                self.granted.insert((request.worker, record.lane), now + request.ttl);
            }
        }
        standing
    }

    /// Until when a worker was given a lane, at best.
    pub(super) fn granted(&self, worker: WorkerId, lane: Lane) -> Option<Duration> {
        self.granted.get(&(worker, lane)).copied()
    }

    pub(super) fn release(&mut self, request: &Release<'_>, now: Duration) {
        self.leases.release(request, self.now(now));
    }

    fn committed(&self) -> impl DoubleEndedIterator<Item = (Position, &Row)> {
        let rows = self.rows.iter().map(|(id, row)| (Position(*id), row));
        rows.filter(|(_, row)| row.visibility == Visibility::Committed)
    }

    /// The first half of a claim: the page and the newest row, at its snapshot.
    pub(super) fn page(&self, claim: &Claim<'_>, now: Duration) -> ClaimReply {
        let mut reply = ClaimReply::default();
        reply.server = self.server;
        if let Some(above) = claim.newest {
            let newest = self.committed().next_back().map(|(position, _)| position);
            reply.newest = newest.filter(|position| *position > above);
        }
        let Some(page) = &claim.page else { return reply };
        reply.covered = page.after;
        reply.end = true;
        let mut bytes = 0;
        for (count, (position, row)) in self.window(page).enumerate() {
            if count >= page.rows {
                reply.end = false;
                break;
            }
            reply.covered = position;
            if page.lanes.contains(&row.lane) {
                let size = row.message.size();
                bytes += size;
                if bytes > claim.bytes && count > 0 {
                    let unread = Swept::new(position, row.lane, size);
                    reply.rows.push(unread.into());
                } else {
                    reply.rows.push(self.delivery(position, row, now));
                }
            } else {
                reply.passed.push(position);
            }
        }
        reply
    }

    fn window(&self, page: &Page<'_>) -> impl Iterator<Item = (Position, &Row)> {
        let (after, through) = (page.after, page.through);
        self.committed().filter(move |(position, _)| *position > after && *position <= through)
    }

    /// The even or the odd ids of the sweep, at a snapshot that is not older than the page's: a sweep
    /// may be several statements, and they may part a span anywhere.
    pub(super) fn sweep(&self, claim: &Claim<'_>, odd: bool, reply: &mut ClaimReply) {
        for (position, row) in self.committed() {
            let now = position.0.is_multiple_of(2) != odd;
            if now && claim.sweep.iter().any(|span| span.contains(position)) {
                reply.swept.push(Swept::new(position, row.lane, row.message.size()));
            }
        }
    }

    /// What is read after the sweep, at a snapshot that is not older.
    pub(super) fn rest(&self, claim: &Claim<'_>, reply: &mut ClaimReply, now: Duration) {
        for (position, row) in self.committed() {
            if claim.watch.contains(&position) {
                let id = RowId::new(position, row.message.id());
                reply.watched.push(Watched::new(id, self.state(row, now)));
            }
        }
        for (id, row) in &self.rows {
            let position = Position(*id);
            if row.visibility != Visibility::Allocated
                && claim.open.iter().any(|span| span.contains(position))
            {
                reply.open.push(position);
            }
        }
        let mut bytes = 0;
        for position in claim.fetch {
            let Some(row) = self.rows.get(&position.0) else { continue };
            if row.visibility != Visibility::Committed {
                continue;
            }
            bytes += row.message.size();
            if bytes > claim.bytes && claim.fetch.len() > 1 {
                let unread = Swept::new(*position, row.lane, row.message.size());
                reply.rows.push(unread.into());
            } else {
                reply.rows.push(self.delivery(*position, row, now));
            }
        }
    }

    /// The last part of a claim.
    pub(super) fn scan(&self, claim: &Claim<'_>, reply: &mut ClaimReply) {
        if let Some(scan) = &claim.scan {
            let mine = self.window(scan).filter(|(_, row)| scan.lanes.contains(&row.lane));
            reply.scanned = mine
                .take(scan.rows)
                .map(|(position, row)| Swept::new(position, row.lane, row.message.size()))
                .collect();
        }
    }

    fn delivery(&self, position: Position, row: &Row, now: Duration) -> Claimed {
        Delivery::new(position, row.lane, row.message.clone())
            .with_state(self.state(row, now))
            .with_age(self.now(now).saturating_sub(row.added))
            .into()
    }

    fn state(&self, row: &Row, now: Duration) -> RowState {
        row.state.with_wait(row.due.saturating_sub(self.now(now)))
    }

    /// Settles; tells which rows left because they were delivered.
    pub(super) fn settle(
        &mut self,
        request: &Settle<'_>,
        now: Duration,
    ) -> (Settled, Vec<MessageId>) {
        let mut delivered = Vec::new();
        for row in request.delivered {
            let here = self.rows.get(&row.id.position.0);
            if here.is_some_and(|here| here.message.id() == row.id.message) {
                self.rows.remove(&row.id.position.0);
                delivered.push(row.id.message);
            }
        }
        let mut refused = Vec::new();
        let db_now = self.now(now);
        for failed in request.failed {
            let current = self.leases.is_current(&failed.lease);
            let row = self.rows.get_mut(&failed.id.position.0).filter(|row| {
                current
                    && row.message.id() == failed.id.message
                    && row.state.attempts == failed.read.attempts
                    && row.state.revision == failed.read.revision
            });
            let Some(row) = row else {
                refused.push(failed.id.position);
                continue;
            };
            row.state.attempts = failed.attempts;
            match failed.settlement {
                Settlement::Retry(after) => row.due = db_now + after,
                Settlement::Held => row.state.held = true,
                Settlement::Dead => {
                    self.dead.insert(failed.id.message);
                    self.rows.remove(&failed.id.position.0);
                }
                _ => unreachable!("no other settlement exists"),
            }
        }
        (Settled::refusing(refused), delivered)
    }

    /// An operator offers a held row again.
    pub(super) fn retry(&mut self, id: u64) {
        if let Some(row) = self.rows.get_mut(&id).filter(|row| row.state.held) {
            row.state = RowState::new(0, row.state.revision + 1);
            row.due = Duration::ZERO;
        }
    }

    /// An operator moves a held row to the dead letters.
    pub(super) fn skip(&mut self, id: u64) {
        if self.rows.get(&id).is_some_and(|row| row.state.held)
            && let Some(row) = self.rows.remove(&id)
        {
            self.dead.insert(row.message.id());
        }
    }

    pub(super) fn held(&self) -> Vec<u64> {
        self.rows.iter().filter(|(_, row)| row.state.held).map(|(id, _)| *id).collect()
    }
}
