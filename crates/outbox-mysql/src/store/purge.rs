//! Deletes old copies from the archive: a batch of the lowest ids, by primary key.
//!
//! Ids follow the time of delivery closely enough, so that no index on it is needed and the cost
//! is bounded by the batch, whatever the size of the archive.

use outbox_core::store::Purge;

use crate::tables::Tables;

pub(super) fn packet(tables: &Tables, request: Purge) -> String {
    let age = u64::try_from(request.older_than.as_micros()).unwrap_or(u64::MAX);
    format!(
        "DELETE d FROM (SELECT id FROM {archive} ORDER BY id LIMIT {limit}) oldest \
         STRAIGHT_JOIN {archive} d FORCE INDEX (PRIMARY) ON d.id = oldest.id \
         WHERE TIMESTAMPDIFF(MICROSECOND, d.delivered_at, UTC_TIMESTAMP(6)) > {age}",
        archive = tables.delivered,
        limit = request.limit,
    )
}
