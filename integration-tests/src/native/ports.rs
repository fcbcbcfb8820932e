//! Ports that a server can keep over its restarts.

use std::{collections::HashSet, net::TcpListener, sync::Mutex};

use anyhow::{Context, Result};
use rand::Rng;

/// A random free port on loopback, never given twice by this process.
///
/// It lies below the range from which the kernel takes the ports of outgoing connections: a port
/// from there could be gone between two starts of the same server.
pub(crate) fn free() -> Result<u16> {
    static GIVEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);
    let mut given = GIVEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let given = given.get_or_insert_default();
    let mut rng = rand::rng();
    (0..1_000)
        .map(|_| rng.random_range(15_000..32_000))
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok() && given.insert(*port))
        .context("no free port between 15000 and 32000 on loopback")
}
