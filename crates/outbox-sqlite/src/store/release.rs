//! Gives leases back. Epochs stay.

use outbox_core::store::Release;

use super::keep_leases::held_by;
use crate::tables::Tables;
use crate::text::{Hex, NOW};

pub(super) fn packet(tables: &Tables, request: &Release<'_>) -> String {
    let mut packet = String::new();
    if !request.leases.is_empty() {
        packet += &format!(
            "UPDATE {} SET owner = NULL, expires_at = {NOW} WHERE {};",
            tables.lane,
            held_by(request.worker, request.leases),
        );
    }
    if request.leaving {
        let me = Hex(request.worker.as_bytes());
        packet += &format!("DELETE FROM {} WHERE worker = {me};", tables.worker);
    }
    packet
}
