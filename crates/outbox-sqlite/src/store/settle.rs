//! Records what became of deliveries.
//!
//! Delivered rows go without a fence: whoever was told that a message is acknowledged may delete
//! it. All else is fenced by the lane's epoch, which nobody changes meanwhile: every write runs in
//! a transaction that keeps other writers out.

use outbox_core::delivery::{Lease, Settlement};
use outbox_core::store::{Delivered, Failed};

use super::keep_leases::micros;
use super::row::at;
use crate::tables::Tables;
use crate::text::{Hex, List, NOW};

/// Every deleted row holds an acknowledged message.
pub(super) fn delivered(tables: &Tables, rows: &[Delivered], archive: bool) -> String {
    let copy = if archive { archive_sql(tables, rows) } else { String::new() };
    let ids = List(rows.iter().map(|row| at(row.id.position)));
    let messages = List(rows.iter().map(|row| Hex(row.id.message.as_bytes())));
    format!(
        "{copy}DELETE FROM {} WHERE id IN ({ids}) AND message_id IN ({messages});",
        tables.outbox
    )
}

/// Copies the rows. Repeating it finds the copies there, or the rows gone.
fn archive_sql(tables: &Tables, rows: &[Delivered]) -> String {
    let receipts: Vec<String> = rows.iter().map(receipt).collect();
    format!(
        "WITH r (id, message_id, partition_no, offset_no) AS (VALUES {receipts}) \
         INSERT OR IGNORE INTO {archive} (outbox_id, message_id, topic, message_key, created_at, \
           attempts, partition_no, offset_no, delivered_at, headers, payload) \
         SELECT o.id, o.message_id, o.topic, o.message_key, o.created_at, o.attempts, \
           r.partition_no, r.offset_no, {NOW}, o.headers, o.payload \
         FROM r CROSS JOIN {outbox} o ON o.id = r.id AND o.message_id = r.message_id;",
        archive = tables.delivered,
        outbox = tables.outbox,
        receipts = receipts.join(","),
    )
}

fn receipt(row: &Delivered) -> String {
    let null = || "NULL".to_owned();
    let partition = row.receipt.partition.map_or_else(null, |n| n.to_string());
    let offset = row.receipt.offset.map_or_else(null, |n| n.to_string());
    let message = Hex(row.id.message.as_bytes());
    format!("({},{message},{partition},{offset})", at(row.id.position))
}

/// The statements of one failed row; the first one tells whether the row was changed.
pub(super) fn failed(tables: &Tables, row: &Failed) -> String {
    match row.settlement {
        Settlement::Retry(wait) => {
            let wait = micros(wait);
            update(tables, row, &format!("available_at = {NOW} + {wait}"))
        }
        Settlement::Dead => bury(tables, row),
        // `Settlement::Held`, and what a newer core may have: it is held.
        _ => {
            update(tables, row, &format!("available_at = NULL, held_at = COALESCE(held_at, {NOW})"))
        }
    }
}

/// The row as it was read (see `read_state`), in a lane that is still leased as it was when the
/// decision was made.
fn fence(tables: &Tables, row: &Failed) -> String {
    let Lease { lane, epoch } = row.lease;
    format!(
        "id = {} AND message_id = {} AND MAX(0, MIN(CAST(attempts AS INTEGER), {most})) = {} \
           AND MAX(0, MIN(CAST(revision AS INTEGER), {most})) = {} AND EXISTS (\
           SELECT 1 FROM {} WHERE lane = {lane} AND epoch = {epoch} AND owner IS NOT NULL)",
        at(row.id.position),
        Hex(row.id.message.as_bytes()),
        row.read.attempts,
        row.read.revision,
        tables.lane,
        most = u32::MAX,
    )
}

fn update(tables: &Tables, row: &Failed, change: &str) -> String {
    format!(
        "UPDATE {} SET attempts = {}, last_error = {}, {change} WHERE {};",
        tables.outbox,
        row.attempts,
        Hex(row.failure.to_string().as_bytes()),
        fence(tables, row),
    )
}

/// Moves the row to the dead letters.
fn bury(tables: &Tables, row: &Failed) -> String {
    let attempts = row.attempts.to_string();
    let failure = Hex(row.failure.to_string().as_bytes()).to_string();
    copy_to_dead(tables, &attempts, &failure, &fence(tables, row))
        + &remove_dead(tables, at(row.id.position), Hex(row.id.message.as_bytes()))
}

/// Inserts full copies of the selected rows into the dead letters.
pub(super) fn copy_to_dead(
    tables: &Tables,
    attempts: &str,
    failure: &str,
    condition: &str,
) -> String {
    format!(
        "INSERT INTO {dead} (outbox_id, message_id, topic, message_key, partition_no, created_at, \
           attempts, last_error, revision, retried, died_at, headers, payload) \
         SELECT id, message_id, topic, message_key, partition_no, created_at, \
           {attempts}, {failure}, revision, retried, {NOW}, headers, payload \
         FROM {outbox} WHERE {condition};",
        dead = tables.dead,
        outbox = tables.outbox,
    )
}

/// Removes a row whose copy is among the dead letters: nothing leaves the outbox without one.
pub(super) fn remove_dead(tables: &Tables, id: i64, message: Hex<'_>) -> String {
    format!(
        "DELETE FROM {outbox} WHERE id = {id} AND message_id = {message} AND EXISTS (\
           SELECT 1 FROM {dead} WHERE message_id = {message} AND outbox_id = {id});",
        outbox = tables.outbox,
        dead = tables.dead,
    )
}
