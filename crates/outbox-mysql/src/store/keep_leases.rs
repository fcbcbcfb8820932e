//! Registers a worker, renews its leases and takes lanes, in one packet.
//!
//! Every statement commits by itself, so that no lock outlives it. Expiry is judged by the
//! database's clock in UTC, and stored as DATETIME, which knows no daylight saving.

use std::fmt::Write as _;
use std::time::Duration;

use outbox_core::delivery::{Lane, Lease, WorkerId};
use outbox_core::store::{
    KeepLeases, LaneRecord, Standing, StoreError, StoreErrorKind, TakeOver, WorkerRecord,
};
use sqlx::mysql::MySqlRow;

use crate::tables::Tables;
use crate::text::{self, Answer, Hex, List};

/// Microseconds since 1970 of a DATETIME: a stamp, compared for equality only.
const STAMP: &str = "TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', expires_at)";

/// What ends later than its own time from now was granted before the clock was set back; but for the
/// lanes that a change of their number keeps.
const EXPIRED: &str = "(expires_at < UTC_TIMESTAMP(6) \
     OR expires_at > UTC_TIMESTAMP(6) + INTERVAL ttl MICROSECOND AND expires_at < '9999-12-31')";

pub(super) fn packet(tables: &Tables, request: &KeepLeases<'_>) -> String {
    let ttl = micros(request.ttl);
    let mut packet = register(tables, request, ttl);
    if !request.renew.is_empty() {
        packet += &renew(tables, request.worker, request.renew, ttl);
    }
    for lane in request.take {
        packet += &take(tables, request.worker, lane, ttl);
    }
    packet += &standing(tables);
    packet
}

/// The heart-beat; and whoever was not seen for ten of its leases is forgotten.
fn register(tables: &Tables, request: &KeepLeases<'_>, ttl: u64) -> String {
    let me = Hex(request.worker.as_bytes());
    let healthy = u8::from(request.healthy);
    let table = &tables.worker;
    format!(
        "INSERT INTO {table} (worker, healthy, seen_at, ttl) \
         VALUES ({me}, {healthy}, UTC_TIMESTAMP(6), {ttl}) \
         ON DUPLICATE KEY UPDATE healthy=VALUES(healthy), seen_at=VALUES(seen_at), \
           ttl=VALUES(ttl);\
         DELETE FROM {table} \
         WHERE ABS(TIMESTAMPDIFF(MICROSECOND, seen_at, UTC_TIMESTAMP(6))) > 10 * ttl;"
    )
}

fn renew(tables: &Tables, worker: WorkerId, leases: &[Lease], ttl: u64) -> String {
    format!(
        "UPDATE {} FORCE INDEX (PRIMARY) \
         SET expires_at = UTC_TIMESTAMP(6) + INTERVAL {ttl} MICROSECOND, ttl = {ttl} WHERE {};",
        tables.lane,
        held_by(worker, leases),
    )
}

/// The condition that a lane is still leased as stated. By primary key: a scan would wait for
/// lanes that others are taking.
pub(super) fn held_by(worker: WorkerId, leases: &[Lease]) -> String {
    let lanes = List(leases.iter().map(|lease| lease.lane));
    let mut epochs = String::new();
    for Lease { lane, epoch } in leases {
        _ = write!(epochs, " WHEN {lane} THEN {epoch}");
    }
    let me = Hex(worker.as_bytes());
    format!("lane IN ({lanes}) AND owner = {me} AND epoch = CASE lane{epochs} END")
}

/// Compare and set by primary key. Assignments run from left to right, the condition first.
fn take(tables: &Tables, worker: WorkerId, wanted: &TakeOver, ttl: u64) -> String {
    let TakeOver { lane, epoch, stamp, .. } = wanted;
    format!(
        "UPDATE {} SET owner = {}, epoch = epoch + 1, \
           expires_at = UTC_TIMESTAMP(6) + INTERVAL {ttl} MICROSECOND, ttl = {ttl} \
         WHERE lane = {lane} AND epoch = {epoch} AND {STAMP} = {stamp} \
           AND (owner IS NULL OR {EXPIRED});",
        tables.lane,
        Hex(worker.as_bytes()),
    )
}

/// All lanes; of a change of their number that is under way, the former and the new ones.
fn standing(tables: &Tables) -> String {
    format!(
        "SELECT lane, epoch, owner, {STAMP}, {EXPIRED}, ttl \
         FROM {lane} WHERE lane < COALESCE((SELECT lanes FROM {meta}), 65535) ORDER BY lane;\
         SELECT worker, healthy, ABS(TIMESTAMPDIFF(MICROSECOND, seen_at, UTC_TIMESTAMP(6))) \
         FROM {worker} ORDER BY worker",
        lane = tables.lane,
        meta = tables.meta,
        worker = tables.worker,
    )
}

pub(super) fn read(answers: Vec<Answer>, server: u64) -> Result<Standing, StoreError> {
    let mut last_two = answers.into_iter().rev();
    let workers = text::take(&mut last_two)?;
    let lanes = text::take(&mut last_two)?;
    let lanes = lanes.rows.iter().map(lane_record).collect::<Result<_, _>>()?;
    let workers = workers.rows.iter().map(worker_record).collect::<Result<_, _>>()?;
    Ok(Standing::new(lanes, workers, server))
}

fn lane_record(row: &MySqlRow) -> Result<LaneRecord, StoreError> {
    let lane = Lane(text::fit(row, 0)?);
    let stamp = text::number(row, 3)?;
    let free = LaneRecord::free(lane, text::number(row, 1)?).with_stamp(stamp);
    let Some(owner) = text::bytes(row, 2)? else { return Ok(free) };
    let owner: [u8; 16] = owner.try_into().map_err(|_| StoreError::from(StoreErrorKind::Schema))?;
    let ttl = Duration::from_micros(text::number(row, 5)?);
    Ok(free.owned(WorkerId::from_bytes(owner), stamp, text::number(row, 4)? == 1, ttl))
}

fn worker_record(row: &MySqlRow) -> Result<WorkerRecord, StoreError> {
    let worker = WorkerId::from_bytes(text::id(row, 0)?);
    let seen = Duration::from_micros(text::number(row, 2)?);
    Ok(WorkerRecord::new(worker, text::number(row, 1)? == 1, seen))
}

/// A duration as whole microseconds; longer than a year is a year, so that dates stay in range.
pub(super) fn micros(duration: Duration) -> u64 {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    u64::try_from(duration.min(YEAR).as_micros()).unwrap_or(u64::MAX)
}
