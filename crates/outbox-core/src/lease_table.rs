//! The rules of leasing as plain data.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::time::Duration;

use crate::delivery::{Lane, Lease, WorkerId};
use crate::store::{KeepLeases, LaneRecord, Release, Standing, WorkerRecord};

/// Who owns which lane: for stores without SQL, and the oracle of the stores with it.
///
/// `now` is always the store's own clock, as time since any fixed origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseTable {
    lanes: Vec<Row>,
    workers: BTreeMap<WorkerId, Seen>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    epoch: u64,
    owner: Option<WorkerId>,
    expires_at: Duration,
    ttl: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    healthy: bool,
    at: Duration,
    ttl: Duration,
}

impl LeaseTable {
    /// A table of `lanes` free lanes at epoch 0.
    pub fn new(lanes: NonZeroU16) -> Self {
        let row = Row { epoch: 0, owner: None, expires_at: Duration::ZERO, ttl: Duration::ZERO };
        Self { lanes: vec![row; lanes.get().into()], workers: BTreeMap::new() }
    }

    /// Does what [`Store::keep_leases`](crate::store::Store::keep_leases) promises.
    pub fn keep(&mut self, request: &KeepLeases<'_>, now: Duration) -> Standing {
        let seen = Seen { healthy: request.healthy, at: now, ttl: request.ttl };
        self.workers.insert(request.worker, seen);
        self.workers.retain(|_, seen| now.abs_diff(seen.at) <= seen.ttl * 10);
        for lease in request.renew {
            if self.owner_of(lease) == Some(request.worker) {
                self.grant(lease.lane, request, now);
            }
        }
        for wanted in request.take {
            let Some(row) = self.lanes.get_mut(usize::from(wanted.lane.0)) else { continue };
            let unchanged = row.epoch == wanted.epoch && row.stamp() == wanted.stamp;
            if unchanged && (row.owner.is_none() || row.is_expired(now)) {
                row.epoch += 1;
                row.owner = Some(request.worker);
                self.grant(wanted.lane, request, now);
            }
        }
        self.standing(now)
    }

    /// Does what [`Store::release`](crate::store::Store::release) promises.
    pub fn release(&mut self, request: &Release<'_>, now: Duration) {
        for lease in request.leases {
            if self.owner_of(lease) == Some(request.worker)
                && let Some(row) = self.lanes.get_mut(usize::from(lease.lane.0))
            {
                row.owner = None;
                row.expires_at = now;
            }
        }
        if request.leaving {
            self.workers.remove(&request.worker);
        }
    }

    /// Whether the lane still has this epoch: the fence of every write about a failed row. A lease
    /// that has expired but was not taken over is still current.
    pub fn is_current(&self, lease: &Lease) -> bool {
        self.owner_of(lease).is_some()
    }

    fn owner_of(&self, lease: &Lease) -> Option<WorkerId> {
        let row = self.lanes.get(usize::from(lease.lane.0))?;
        if row.epoch == lease.epoch { row.owner } else { None }
    }

    fn grant(&mut self, lane: Lane, request: &KeepLeases<'_>, now: Duration) {
        if let Some(row) = self.lanes.get_mut(usize::from(lane.0)) {
            row.expires_at = now.saturating_add(request.ttl);
            row.ttl = request.ttl;
        }
    }

    fn standing(&self, now: Duration) -> Standing {
        let lanes = (0..).map(Lane).zip(&self.lanes).map(|(lane, row)| {
            let free = LaneRecord::free(lane, row.epoch).with_stamp(row.stamp());
            match row.owner {
                None => free,
                Some(owner) => free.owned(owner, row.stamp(), row.is_expired(now), row.ttl),
            }
        });
        let workers = self
            .workers
            .iter()
            .map(|(worker, seen)| WorkerRecord::new(*worker, seen.healthy, now.abs_diff(seen.at)));
        Standing::new(lanes.collect(), workers.collect(), 0)
    }

    /// Encodes the table. The first byte is the version of the format.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![1];
        out.extend_from_slice(&(self.lanes.len() as u16).to_le_bytes());
        for row in &self.lanes {
            out.extend_from_slice(&row.epoch.to_le_bytes());
            out.extend_from_slice(&micros(row.expires_at).to_le_bytes());
            out.extend_from_slice(&micros(row.ttl).to_le_bytes());
            out.push(row.owner.is_some().into());
            out.extend_from_slice(row.owner.map_or([0; 16], |owner| *owner.as_bytes()).as_slice());
        }
        for (worker, seen) in &self.workers {
            out.extend_from_slice(worker.as_bytes());
            out.push(seen.healthy.into());
            out.extend_from_slice(&micros(seen.at).to_le_bytes());
            out.extend_from_slice(&micros(seen.ttl).to_le_bytes());
        }
        out
    }

    /// Decodes what [`encode`](Self::encode) wrote; `None` for anything else.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut input = bytes;
        if take::<1>(&mut input)? != [1] {
            return None;
        }
        let count = NonZeroU16::new(u16::from_le_bytes(take(&mut input)?))?;
        let mut table = Self::new(count);
        for row in &mut table.lanes {
            row.epoch = u64::from_le_bytes(take(&mut input)?);
            row.expires_at = Duration::from_micros(u64::from_le_bytes(take(&mut input)?));
            row.ttl = Duration::from_micros(u64::from_le_bytes(take(&mut input)?));
            let owned = take::<1>(&mut input)? == [1];
            let owner = WorkerId::from_bytes(take(&mut input)?);
            row.owner = owned.then_some(owner);
        }
        while !input.is_empty() {
            let worker = WorkerId::from_bytes(take(&mut input)?);
            let healthy = take::<1>(&mut input)? == [1];
            let at = Duration::from_micros(u64::from_le_bytes(take(&mut input)?));
            let ttl = Duration::from_micros(u64::from_le_bytes(take(&mut input)?));
            table.workers.insert(worker, Seen { healthy, at, ttl });
        }
        Some(table)
    }
}

impl Row {
    /// A lease that ends later than its own time from now was granted before the clock was set back.
    fn is_expired(&self, now: Duration) -> bool {
        self.expires_at < now || self.expires_at.saturating_sub(now) > self.ttl
    }

    fn stamp(&self) -> u64 {
        micros(self.expires_at)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn take<const N: usize>(input: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = input.split_at_checked(N)?;
    *input = tail;
    head.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::TakeOver;

    const TTL: Duration = Duration::from_secs(10);
    const A: WorkerId = WorkerId::from_bytes([1; 16]);
    const B: WorkerId = WorkerId::from_bytes([2; 16]);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn take_lane(table: &mut LeaseTable, worker: WorkerId, lane: u16, now: Duration) -> Standing {
        let standing = table.keep(&KeepLeases::new(worker, TTL), now);
        let take = [TakeOver::of(&standing.lanes[usize::from(lane)])];
        table.keep(&KeepLeases::new(worker, TTL).take(&take), now)
    }

    #[test]
    fn a_free_lane_is_taken_under_the_next_epoch() {
        let mut table = LeaseTable::new(NonZeroU16::MIN);
        let standing = take_lane(&mut table, A, 0, at(1));
        assert_eq!(standing.lanes[0].owner, Some(A));
        assert_eq!(standing.lanes[0].epoch, 1);
        assert!(table.is_current(&Lease::new(Lane(0), 1)));
        assert!(!table.is_current(&Lease::new(Lane(0), 0)));
    }

    #[test]
    fn a_lane_that_has_not_expired_is_not_taken() {
        let mut table = LeaseTable::new(NonZeroU16::MIN);
        take_lane(&mut table, A, 0, at(1));
        assert_eq!(take_lane(&mut table, B, 0, at(11)).lanes[0].owner, Some(A));
        assert_eq!(take_lane(&mut table, B, 0, at(12)).lanes[0].owner, Some(B));
    }

    #[test]
    fn a_take_over_needs_the_observed_epoch_and_stamp() {
        let mut table = LeaseTable::new(NonZeroU16::MIN);
        let observed = take_lane(&mut table, A, 0, at(1)).lanes[0].clone();
        table.keep(&KeepLeases::new(A, TTL).renew(&[Lease::new(Lane(0), 1)]), at(2));
        let take = [TakeOver::of(&observed)];
        let standing = table.keep(&KeepLeases::new(B, TTL).take(&take), at(60));
        assert_eq!(standing.lanes[0].owner, Some(A));
    }

    #[test]
    fn only_the_owner_renews_and_releases_and_the_epoch_stays() {
        let mut table = LeaseTable::new(NonZeroU16::MIN);
        take_lane(&mut table, A, 0, at(1));
        let lease = [Lease::new(Lane(0), 1)];
        table.keep(&KeepLeases::new(B, TTL).renew(&lease), at(5));
        table.release(&Release::new(B, &lease), at(5));
        assert_eq!(table.standing(at(5)).lanes[0].owner, Some(A));
        table.release(&Release::new(A, &lease), at(5));
        assert_eq!(table.standing(at(5)).lanes[0].owner, None);
        assert_eq!(table.standing(at(5)).lanes[0].epoch, 1);
        assert_eq!(take_lane(&mut table, B, 0, at(5)).lanes[0].epoch, 2);
    }

    #[test]
    fn a_worker_unseen_for_ten_leases_is_forgotten() {
        let mut table = LeaseTable::new(NonZeroU16::MIN);
        table.keep(&KeepLeases::new(A, TTL), at(0));
        assert_eq!(table.keep(&KeepLeases::new(B, TTL), at(100)).workers.len(), 2);
        assert_eq!(table.keep(&KeepLeases::new(B, TTL), at(101)).workers.len(), 1);
    }

    #[test]
    fn decode_returns_what_encode_was_given() {
        let mut table = LeaseTable::new(NonZeroU16::new(3).unwrap());
        take_lane(&mut table, A, 1, at(1));
        let bytes = table.encode();
        assert_eq!(LeaseTable::decode(&bytes), Some(table));
        assert_eq!(LeaseTable::decode(&bytes[..20]), None);
        assert_eq!(LeaseTable::decode(&[]), None);
    }
}
