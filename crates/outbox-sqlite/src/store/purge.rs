//! Deletes old copies from the archive: a batch of the lowest ids, by primary key.
//!
//! Ids follow the time of delivery closely enough, so that no index on it is needed and the cost
//! is bounded by the batch, whatever the size of the archive.

use std::time::Duration;

use crate::tables::Tables;
use crate::text::NOW;

pub(super) fn sql(tables: &Tables, older_than: Duration, rows: usize) -> String {
    let age = i64::try_from(older_than.as_micros()).unwrap_or(i64::MAX);
    format!(
        "DELETE FROM {archive} WHERE id IN (SELECT id FROM {archive} ORDER BY id LIMIT {rows}) \
         AND {NOW} - delivered_at > {age};",
        archive = tables.delivered,
    )
}
