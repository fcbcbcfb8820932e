//! Counts what waits, without a full scan.

use std::time::Duration;

use outbox_core::store::{Backlog, StoreError};

use crate::tables::Tables;
use crate::text::{self, Answer};

/// So many held and dead messages are counted.
const COUNTED: u64 = 100_000;

/// One bounded scan of the oldest rows. Should all of them be of held keys, the age is that of the
/// newest of them: the oldest row that is not held is no older.
pub(super) fn packet(tables: &Tables) -> String {
    format!(
        "SELECT COUNT(*), TIMESTAMPDIFF(MICROSECOND, \
           COALESCE(MIN(IF(blocked, NULL, created_at)), \
             IF(COUNT(*) > {limit}, MAX(created_at), NULL)), UTC_TIMESTAMP(6)) \
         FROM (SELECT o.created_at, o.held_at IS NOT NULL OR EXISTS (\
             SELECT 1 FROM {held} h STRAIGHT_JOIN {outbox} b FORCE INDEX (PRIMARY) ON {there} \
             WHERE h.topic = o.topic AND h.message_key = o.message_key\
           ) AS blocked FROM {outbox} o FORCE INDEX (PRIMARY) ORDER BY o.id LIMIT {more}) oldest;\
         SELECT COUNT(*) FROM (\
           SELECT 1 FROM {held} h STRAIGHT_JOIN {outbox} b FORCE INDEX (PRIMARY) ON {there} \
           LIMIT {COUNTED}) held;\
         SELECT COUNT(*) FROM (SELECT 1 FROM {dead} LIMIT {COUNTED}) dead",
        limit = Backlog::EXACT_LIMIT,
        more = Backlog::EXACT_LIMIT + 1,
        outbox = tables.outbox,
        held = tables.held,
        dead = tables.dead,
        // A late acknowledgement may have deleted a row that another worker held.
        there = "b.id = h.outbox_id AND b.message_id = h.message_id",
    )
}

pub(super) fn read(answers: &[Answer]) -> Result<Backlog, StoreError> {
    let count = |answer: usize, column| -> Result<Option<u64>, StoreError> {
        let row = answers.get(answer).and_then(|answer| answer.rows.first());
        let value = row.map(|row| text::signed(row, column)).transpose()?.flatten();
        Ok(value.map(|value| u64::try_from(value).unwrap_or(0)))
    };
    let age = count(0, 1)?.map(Duration::from_micros);
    let number = |answer| Ok::<_, StoreError>(count(answer, 0)?.unwrap_or(0));
    Ok(Backlog::new(number(0)?, age, number(1)?, number(2)?))
}
