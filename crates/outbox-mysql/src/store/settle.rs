//! Records what became of deliveries.
//!
//! Delivered rows go without a fence: whoever was told that a message is acknowledged may delete
//! it. All else is fenced by the lane's epoch, always as a JOIN in UPDATE or in SELECT .. FOR
//! UPDATE: those read the newest committed epoch and lock it, while EXISTS in an UPDATE and a
//! plain INSERT .. SELECT read an old snapshot of it.

use std::fmt::Write as _;

use outbox_core::delivery::{Lease, Position, Settlement};
use outbox_core::store::{Delivered, Failed, Settle};

use super::keep_leases::micros;
use crate::tables::Tables;
use crate::text::{Answer, Hex, LIST, List};

/// So many failures share one transaction: it holds their lanes' rows, so it must be short.
const FAILURES: usize = 100;

/// So many neighbours are a range: about the fewest for which it saves something. What runs of several
/// lengths save: `cargo xtask bench statements`.
const RUN: usize = 8;

/// Ids are near to each other when no more than so many go to each row: about as many as one literal
/// costs less for than a list.
const NEAR: usize = 6;

/// Bytes of the id of a message.
const MESSAGE: usize = 16;

/// One packet, and which of its answers decide about which failed row.
pub(super) struct Packet {
    pub(super) text: String,
    /// The statement that changes the row, by its number in the packet.
    pub(super) decisive: Vec<(usize, Position)>,
}

pub(super) fn packets(tables: &Tables, settle: &Settle<'_>) -> Vec<Packet> {
    let delivered = settle.delivered.chunks(LIST).map(|rows| {
        let acknowledged = acknowledged(rows, settle.repeated);
        let delete = delete_sql(tables, &acknowledged);
        let text = match settle.archive {
            true => archive(tables, rows, &acknowledged, &delete),
            false => delete,
        };
        Packet { text, decisive: Vec::new() }
    });
    // Each locks its lane: in one order, and where one must lock it alone that one first, so that
    // neither the renewal of leases nor another settle holds what it waits for.
    let mut failed: Vec<&Failed> = settle.failed.iter().collect();
    failed.sort_by_key(|row| (row.lease.lane, !matches!(row.settlement, Settlement::Dead)));
    let failed = failed.chunks(FAILURES).map(|rows| fail(tables, rows));
    delivered.chain(failed).collect()
}

/// The failed rows whose decisive statement changed nothing.
pub(super) fn refused(
    decisive: &[(usize, Position)],
    answers: &[Answer],
) -> impl Iterator<Item = Position> {
    decisive
        .iter()
        .filter(|(statement, _)| answers.get(*statement).is_none_or(|answer| answer.affected == 0))
        .map(|(_, position)| *position)
}

/// Every deleted row holds the message that was acknowledged under its id: ids may have been reused
/// after a fail-over.
fn acknowledged(rows: &[Delivered], are_gone: bool) -> String {
    let ids = if are_gone { list(rows.iter()) } else { ranges(rows) };
    format!("({ids}) AND {}", messages(rows))
}

/// That a row holds its message. Where the ids are near to each other the messages are one literal,
/// each at the place that its id has in it: nothing is parsed nor searched for each row. What either
/// form costs: `cargo xtask bench statements`.
fn messages(rows: &[Delivered]) -> String {
    let Some(places) = places(rows) else {
        let messages = List(rows.iter().map(|row| Hex(row.id.message.as_bytes())));
        return format!("o.message_id IN ({messages})");
    };
    let mut messages = vec![[0; MESSAGE]; places];
    for row in rows {
        let place = row.id.position.0 % places as u64;
        messages[place as usize] = *row.id.message.as_bytes();
    }
    let messages = messages.as_flattened();
    format!(
        "o.message_id = SUBSTR({}, 1 + {MESSAGE} * (o.id MOD {places}), {MESSAGE})",
        Hex(messages)
    )
}

/// How many places there must be for each row to have its own, by the rest of its id; none where that
/// would be too many, or where the ids do not ascend.
fn places(rows: &[Delivered]) -> Option<usize> {
    let ids = rows.iter().map(|row| row.id.position.0);
    let (first, last) = (ids.clone().next()?, ids.clone().next_back()?);
    let width = usize::try_from(last.checked_sub(first)?).ok()?.checked_add(1)?;
    (width <= rows.len() * NEAR && ids.is_sorted_by(|id, next| id < next)).then_some(width)
}

fn list<'a>(rows: impl Iterator<Item = &'a Delivered> + Clone) -> String {
    format!("o.id IN ({})", List(rows.map(|row| row.id.position)))
}

/// The rows by their ids, runs of neighbours as ranges, which the database reads for less.
///
/// A range is read until a row behind its end is met. Were that one of a writer who has not
/// committed, the delete would wait for the writer: so the last row of a run is in the list, and is
/// what the range meets. Rows that may be gone are only listed.
fn ranges(rows: &[Delivered]) -> String {
    let (mut ranges, mut listed) = (String::new(), Vec::with_capacity(rows.len()));
    let position = |row: &Delivered| row.id.position;
    for run in rows.chunk_by(|row, next| position(row).0.checked_add(1) == Some(position(next).0)) {
        match run {
            [first, .., before, last] if run.len() >= RUN => {
                let (first, before) = (position(first), position(before));
                _ = write!(ranges, "o.id BETWEEN {first} AND {before} OR ");
                listed.push(last);
            }
            _ => listed.extend(run),
        }
    }
    ranges + &list(listed.into_iter())
}

/// Deletes rows of the outbox by their ids. With a list that is long beside the table both servers
/// would rather read the whole table: the delete then waits for rows that a writer has not committed,
/// and locks what a writer is about to need. Only the form for several tables takes an index.
pub(super) fn delete_sql(tables: &Tables, condition: &str) -> String {
    format!("DELETE o FROM {} o FORCE INDEX (PRIMARY) WHERE {condition}", tables.outbox)
}

/// Copies the rows, then deletes them. Repeating it finds the copies there.
///
/// The receipts come first, whatever the server thinks: where MySQL took the outbox for nearly empty,
/// which that of a relay that keeps up is, it read all receipts anew for each row.
fn archive(tables: &Tables, rows: &[Delivered], acknowledged: &str, delete: &str) -> String {
    let receipts: Vec<String> = rows.iter().map(receipt).collect();
    format!(
        "BEGIN;\
         INSERT IGNORE INTO {archive} (outbox_id, message_id, topic, message_key, headers, payload, \
           created_at, attempts, partition_no, offset_no, delivered_at) \
         SELECT o.id, o.message_id, o.topic, o.message_key, o.headers, o.payload, \
           o.created_at, o.attempts, r.partition_no, r.offset_no, UTC_TIMESTAMP(6) \
         FROM JSON_TABLE('[{receipts}]', '$[*]' COLUMNS (\
           id BIGINT UNSIGNED PATH '$[0]', partition_no INT PATH '$[1]', \
           offset_no BIGINT PATH '$[2]')) r \
         STRAIGHT_JOIN {outbox} o FORCE INDEX (PRIMARY) ON o.id = r.id WHERE {acknowledged};\
         {delete};\
         COMMIT",
        archive = tables.delivered,
        outbox = tables.outbox,
        receipts = receipts.join(","),
    )
}

/// A row's receipt as JSON: numbers and null only.
fn receipt(row: &Delivered) -> String {
    let null = || "null".to_owned();
    let partition = row.receipt.partition.map_or_else(null, |n| n.to_string());
    let offset = row.receipt.offset.map_or_else(null, |n| n.to_string());
    format!("[{},{partition},{offset}]", row.id.position)
}

fn fail(tables: &Tables, rows: &[&Failed]) -> Packet {
    let mut packet = Packet { text: "BEGIN;".to_owned(), decisive: Vec::new() };
    let mut statements = 1;
    for row in rows {
        packet.decisive.push((statements, row.id.position));
        let (text, count) = match row.settlement {
            Settlement::Retry(wait) => (retry(tables, row, micros(wait)), 1),
            Settlement::Dead => (bury(tables, row), 3),
            // `Settlement::Held`, and what a newer core may have: it is held.
            _ => (hold(tables, row), 2),
        };
        packet.text += &text;
        statements += count;
    }
    packet.text += "COMMIT";
    packet
}

/// The row as it was read, in a lane that is still leased as it was when the decision was made.
fn fence(row: &Failed) -> String {
    let Lease { lane, epoch } = row.lease;
    format!(
        "o.id = {} AND o.message_id = {} AND o.attempts = {} AND o.revision = {} \
         AND o.lane = {lane} AND f.lane = {lane} AND f.epoch = {epoch} AND f.owner IS NOT NULL",
        row.id.position,
        Hex(row.id.message.as_bytes()),
        row.read.attempts,
        row.read.revision,
    )
}

fn retry(tables: &Tables, row: &Failed, wait: u64) -> String {
    format!(
        "UPDATE {outbox} o JOIN {lane} f ON f.lane = o.lane \
         SET o.attempts = {attempts}, o.last_error = {failure}, \
           o.available_at = UTC_TIMESTAMP(6) + INTERVAL {wait} MICROSECOND \
         WHERE {fence};",
        outbox = tables.outbox,
        lane = tables.lane,
        attempts = row.attempts,
        failure = Hex(row.failure.to_string().as_bytes()),
        fence = fence(row),
    )
}

/// Marks the row, and lists it among the held ones in the same transaction. The row of the outbox
/// is always locked before the one of the list.
fn hold(tables: &Tables, row: &Failed) -> String {
    format!(
        "UPDATE {outbox} o JOIN {lane} f ON f.lane = o.lane \
         SET o.attempts = {attempts}, o.last_error = {failure}, o.available_at = NULL, \
           o.held_at = COALESCE(o.held_at, UTC_TIMESTAMP(6)) \
         WHERE {fence};\
         REPLACE INTO {held} (outbox_id, message_id, topic, message_key, held_at) \
         SELECT id, message_id, topic, message_key, held_at FROM {outbox} \
         WHERE id = {id} AND message_id = {message} AND held_at IS NOT NULL FOR UPDATE;",
        outbox = tables.outbox,
        lane = tables.lane,
        held = tables.held,
        attempts = row.attempts,
        failure = Hex(row.failure.to_string().as_bytes()),
        fence = fence(row),
        id = row.id.position,
        message = Hex(row.id.message.as_bytes()),
    )
}

/// Moves the row to the dead letters. Nothing leaves the outbox unless its copy arrived.
fn bury(tables: &Tables, row: &Failed) -> String {
    let id = row.id.position;
    let message = Hex(row.id.message.as_bytes());
    let mut text = String::new();
    let attempts = row.attempts.to_string();
    let failure = Hex(row.failure.to_string().as_bytes()).to_string();
    let from = format!(
        "FROM {} o JOIN {} f ON f.lane = o.lane WHERE {} FOR UPDATE",
        tables.outbox,
        tables.lane,
        fence(row),
    );
    text += &copy_to_dead(tables, &attempts, &failure, &from);
    _ = write!(text, "{}", remove_dead(tables, id, &message));
    text
}

/// Inserts full copies of the selected rows `o` into the dead letters.
pub(super) fn copy_to_dead(tables: &Tables, attempts: &str, failure: &str, from: &str) -> String {
    format!(
        "INSERT INTO {dead} (outbox_id, message_id, topic, message_key, partition_no, headers, \
           payload, created_at, attempts, last_error, revision, retried, died_at) \
         SELECT o.id, o.message_id, o.topic, o.message_key, o.partition_no, o.headers, \
           o.payload, o.created_at, {attempts}, {failure}, o.revision, o.retried, \
           UTC_TIMESTAMP(6) {from};",
        dead = tables.dead,
    )
}

/// Removes a row whose copy is among the dead letters, and its place among the held ones.
pub(super) fn remove_dead(tables: &Tables, id: Position, message: &Hex<'_>) -> String {
    format!(
        "DELETE o FROM {outbox} o JOIN {dead} d \
           ON d.message_id = o.message_id AND d.outbox_id = o.id \
         WHERE o.id = {id} AND o.message_id = {message};\
         DELETE h FROM {held} h JOIN {dead} d \
           ON d.message_id = h.message_id AND d.outbox_id = h.outbox_id \
         WHERE h.outbox_id = {id} AND h.message_id = {message};",
        outbox = tables.outbox,
        dead = tables.dead,
        held = tables.held,
    )
}

#[cfg(test)]
mod tests {
    use outbox_core::delivery::{Receipt, RowId};
    use outbox_core::message::MessageId;

    use super::*;

    fn rows(ids: &[u64]) -> Vec<Delivered> {
        let row = |id: &u64| {
            let message = MessageId::from_bytes([*id as u8; MESSAGE]);
            Delivered::new(RowId::new(Position(*id), message), Receipt::default())
        };
        ids.iter().map(row).collect()
    }

    #[test]
    fn each_id_has_a_place_of_its_own_where_ids_are_near_to_each_other() {
        assert_eq!(places(&rows(&[7])), Some(1));
        assert_eq!(places(&rows(&[7, 9, 10])), Some(4));
        assert_eq!(places(&rows(&[1, 12])), Some(12));
        assert_eq!(places(&rows(&[1, 13])), None, "more than 6 for each");
        assert_eq!(places(&rows(&[0, u64::MAX])), None);
    }

    #[test]
    fn rows_of_one_id_or_in_no_order_are_listed() {
        assert_eq!(places(&rows(&[7, 7, 8])), None);
        assert_eq!(places(&rows(&[7, 9, 8])), None);
        assert!(messages(&rows(&[7, 7])).starts_with("o.message_id IN (x'0707"));
    }

    #[test]
    fn a_message_lies_at_the_place_of_its_id() {
        let (four, five) = ("04".repeat(MESSAGE), "05".repeat(MESSAGE));
        assert_eq!(
            messages(&rows(&[4, 5])),
            format!("o.message_id = SUBSTR(x'{four}{five}', 1 + 16 * (o.id MOD 2), 16)")
        );
    }
}
