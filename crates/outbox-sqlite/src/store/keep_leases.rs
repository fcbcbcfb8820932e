//! Registers a worker, renews its leases and takes lanes, in one packet.
//!
//! The rules are those of `LeaseTable`. Expiry is judged by SQLite's clock in UTC.

use std::fmt::Write as _;
use std::time::Duration;

use outbox_core::delivery::{Lane, Lease, WorkerId};
use outbox_core::store::{
    KeepLeases, LaneRecord, Standing, StoreError, StoreErrorKind, TakeOver, WorkerRecord,
};
use sqlx::sqlite::SqliteRow;

use crate::tables::Tables;
use crate::text::{self, Answer, Hex, List, NOW};

/// What ends later than its own time from now was granted before the clock was set back.
fn expired() -> String {
    format!("expires_at NOT BETWEEN {NOW} AND {NOW} + ttl")
}

/// The standing comes after the commit, so that no answer is read while writers are kept out.
pub(super) fn packet(tables: &Tables, request: &KeepLeases<'_>) -> String {
    let ttl = micros(request.ttl);
    let mut packet = "BEGIN IMMEDIATE;".to_owned();
    packet += &register(tables, request, ttl);
    if !request.renew.is_empty() {
        packet += &renew(tables, request.worker, request.renew, ttl);
    }
    for lane in request.take {
        packet += &take(tables, request.worker, lane, ttl);
    }
    packet += "COMMIT;";
    packet += &standing(tables);
    packet
}

/// The heart-beat; and whoever was not seen for ten of its leases is forgotten.
fn register(tables: &Tables, request: &KeepLeases<'_>, ttl: u64) -> String {
    let me = Hex(request.worker.as_bytes());
    let healthy = u8::from(request.healthy);
    let table = &tables.worker;
    format!(
        "INSERT OR REPLACE INTO {table} (worker, healthy, seen_at, ttl) \
         VALUES ({me}, {healthy}, {NOW}, {ttl});\
         DELETE FROM {table} WHERE ABS({NOW} - seen_at) > 10 * ttl;"
    )
}

fn renew(tables: &Tables, worker: WorkerId, leases: &[Lease], ttl: u64) -> String {
    format!(
        "UPDATE {} SET expires_at = {NOW} + {ttl}, ttl = {ttl} WHERE {};",
        tables.lane,
        held_by(worker, leases),
    )
}

/// The condition that a lane is still leased as stated.
pub(super) fn held_by(worker: WorkerId, leases: &[Lease]) -> String {
    let lanes = List(leases.iter().map(|lease| lease.lane));
    let mut epochs = String::new();
    for Lease { lane, epoch } in leases {
        _ = write!(epochs, " WHEN {lane} THEN {epoch}");
    }
    let me = Hex(worker.as_bytes());
    format!("lane IN ({lanes}) AND owner = {me} AND epoch = CASE lane{epochs} END")
}

/// Compare and set.
fn take(tables: &Tables, worker: WorkerId, wanted: &TakeOver, ttl: u64) -> String {
    let TakeOver { lane, epoch, stamp, .. } = wanted;
    format!(
        "UPDATE {} SET owner = {}, epoch = epoch + 1, expires_at = {NOW} + {ttl}, ttl = {ttl} \
         WHERE lane = {lane} AND epoch = {epoch} AND expires_at = {stamp} \
           AND (owner IS NULL OR {expired});",
        tables.lane,
        Hex(worker.as_bytes()),
        expired = expired(),
    )
}

fn standing(tables: &Tables) -> String {
    format!(
        "SELECT lane, epoch, owner, expires_at, {expired}, ttl FROM {lane} ORDER BY lane;\
         SELECT worker, healthy, ABS({NOW} - seen_at) FROM {worker} ORDER BY worker;\
         SELECT server FROM {meta}",
        expired = expired(),
        lane = tables.lane,
        worker = tables.worker,
        meta = tables.meta,
    )
}

pub(super) fn read(answers: Vec<Answer>) -> Result<Standing, StoreError> {
    let mut from_last = answers.into_iter().rev();
    let server = text::take(&mut from_last)?;
    let workers = text::take(&mut from_last)?;
    let lanes = text::take(&mut from_last)?;
    let server = server.rows.first().ok_or_else(|| StoreError::from(StoreErrorKind::Schema))?;
    let server = text::signed(server, 0)?.unwrap_or(0).cast_unsigned();
    let lanes = lanes.rows.iter().map(lane_record).collect::<Result<_, _>>()?;
    let workers = workers.rows.iter().map(worker_record).collect::<Result<_, _>>()?;
    Ok(Standing::new(lanes, workers, server))
}

fn lane_record(row: &SqliteRow) -> Result<LaneRecord, StoreError> {
    let lane = Lane(text::fit(row, 0)?);
    let stamp = text::number(row, 3)?;
    let free = LaneRecord::free(lane, text::number(row, 1)?).with_stamp(stamp);
    let Some(owner) = text::bytes(row, 2)? else { return Ok(free) };
    let owner: [u8; 16] = owner.try_into().map_err(|_| StoreError::from(StoreErrorKind::Schema))?;
    let ttl = Duration::from_micros(text::number(row, 5)?);
    Ok(free.owned(WorkerId::from_bytes(owner), stamp, text::number(row, 4)? == 1, ttl))
}

fn worker_record(row: &SqliteRow) -> Result<WorkerRecord, StoreError> {
    let worker = WorkerId::from_bytes(text::id(row, 0)?);
    let seen = Duration::from_micros(text::number(row, 2)?);
    Ok(WorkerRecord::new(worker, text::number(row, 1)? == 1, seen))
}

/// A duration as whole microseconds; longer than a year is a year, so that times stay in range.
pub(super) fn micros(duration: Duration) -> u64 {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    u64::try_from(duration.min(YEAR).as_micros()).unwrap_or(u64::MAX)
}
