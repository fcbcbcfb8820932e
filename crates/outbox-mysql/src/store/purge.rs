//! Deletes old copies from the archive: a batch of the lowest ids, by primary key.
//!
//! Ids follow the time of delivery closely enough, so that no index on it is needed and the cost
//! is bounded by the batch, whatever the size of the archive. The ids are read before, without a
//! lock: a DELETE that looked for them itself would lock all that it looks at, and those of two
//! workers would deadlock.

use outbox_core::delivery::Position;
use outbox_core::store::{Purge, StoreError};

use crate::tables::Tables;
use crate::text::{self, Answer, LIST, List};

/// Reads the ids of old copies.
pub(super) fn oldest(tables: &Tables, request: Purge) -> String {
    format!(
        "SELECT id FROM (SELECT id, delivered_at FROM {archive} FORCE INDEX (PRIMARY) \
           ORDER BY id LIMIT {limit}) oldest \
         WHERE {is_old}",
        archive = tables.delivered,
        limit = request.limit,
        is_old = is_old("delivered_at", request),
    )
}

fn is_old(delivered_at: &str, request: Purge) -> String {
    let age = u64::try_from(request.older_than.as_micros()).unwrap_or(u64::MAX);
    format!("TIMESTAMPDIFF(MICROSECOND, {delivered_at}, UTC_TIMESTAMP(6)) > {age}")
}

pub(super) fn read(answers: &[Answer]) -> Result<Vec<Position>, StoreError> {
    let rows = answers.iter().flat_map(|answer| &answer.rows);
    rows.map(|row| Ok(Position(text::number(row, 0)?))).collect()
}

/// The age is asked for again because it is in no index: for ids alone MySQL would read the whole
/// index of a table that it takes for nearly empty.
pub(super) fn delete(tables: &Tables, request: Purge, ids: &[Position]) -> String {
    let lists = ids.chunks(LIST).map(|ids| {
        format!(
            "DELETE d FROM {} d FORCE INDEX (PRIMARY) WHERE d.id IN ({}) AND {}",
            tables.delivered,
            List(ids),
            is_old("d.delivered_at", request),
        )
    });
    lists.collect::<Vec<_>>().join(";")
}
