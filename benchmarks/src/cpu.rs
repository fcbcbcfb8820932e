//! Who used the processor, from the kernel's own counts, and how often memory was allocated.

use std::{
    fs,
    ops::{AddAssign, Sub},
};

use anyhow::{Context, Result};

/// Ticks of `/proc` in a second; 100 on every Linux that runs these servers.
const TICKS: f64 = 100.0;

/// Seconds of processor time, by who used them, and what this process allocated.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cpu {
    /// The database server.
    pub(crate) database: f64,
    /// The Kafka node.
    pub(crate) kafka: f64,
    /// Threads of the runtime that runs the relay: our code and sqlx.
    pub(crate) relay: f64,
    /// librdkafka's threads, and the one that hands its answers over.
    pub(crate) client: f64,
    /// How often this process allocated; zero if it does not count.
    pub(crate) allocations: f64,
    /// How many bytes, without what was given back.
    pub(crate) bytes: f64,
}

/// Whether allocations are counted.
pub(crate) const COUNTS: bool = cfg!(feature = "allocations");

#[cfg(feature = "allocations")]
fn allocated() -> (usize, usize) {
    let stats = stats_alloc::INSTRUMENTED_SYSTEM.stats();
    (stats.allocations + stats.reallocations, stats.bytes_allocated)
}

#[cfg(not(feature = "allocations"))]
fn allocated() -> (usize, usize) {
    (0, 0)
}

impl Cpu {
    /// Counts of now. Threads of this process are told by their names.
    pub(crate) fn now(database: u32, kafka: u32) -> Result<Self> {
        let (allocations, bytes) = allocated();
        let mut cpu = Self {
            allocations: allocations as f64,
            bytes: bytes as f64,
            database: used(&format!("/proc/{database}/stat"))?.1,
            kafka: used(&format!("/proc/{kafka}/stat"))?.1,
            ..Self::default()
        };
        for thread in fs::read_dir("/proc/self/task")? {
            // A thread that ended since it was listed.
            let Ok((name, seconds)) = used(&format!("{}/stat", thread?.path().display())) else {
                continue;
            };
            match name.as_str() {
                RELAY_THREAD => cpu.relay += seconds,
                // The names of threads are cut after fifteen characters.
                "outbox-kafka" | "producer pollin" => cpu.client += seconds,
                name if name.starts_with("rdk:") => cpu.client += seconds,
                _ => {}
            }
        }
        Ok(cpu)
    }

    /// Of each of so many messages, in µs: database, Kafka, relay, librdkafka.
    pub(crate) fn of_each(&self, messages: usize) -> [String; 4] {
        [self.database, self.kafka, self.relay, self.client]
            .map(|seconds| format!("{:.1}", seconds * 1e6 / messages as f64))
    }

    /// Everything.
    pub(crate) fn total(&self) -> f64 {
        self.database + self.kafka + self.relay + self.client
    }
}

/// The name of the threads that run a relay.
pub(crate) const RELAY_THREAD: &str = "relay";

impl Sub for Cpu {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            database: self.database - before.database,
            kafka: self.kafka - before.kafka,
            relay: self.relay - before.relay,
            client: self.client - before.client,
            allocations: self.allocations - before.allocations,
            bytes: self.bytes - before.bytes,
        }
    }
}

impl AddAssign for Cpu {
    fn add_assign(&mut self, other: Self) {
        self.database += other.database;
        self.kafka += other.kafka;
        self.relay += other.relay;
        self.client += other.client;
        self.allocations += other.allocations;
        self.bytes += other.bytes;
    }
}

/// The name of a process or thread, and the seconds it ran in user and kernel mode.
fn used(path: &str) -> Result<(String, f64)> {
    let stat = fs::read_to_string(path).with_context(|| path.to_owned())?;
    parse(&stat).with_context(|| format!("{path} is not as expected"))
}

fn parse(stat: &str) -> Option<(String, f64)> {
    // The name is in brackets and may hold any character.
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let kernel: f64 = fields.next()?.parse().ok()?;
    Some((name.to_owned(), (user + kernel) / TICKS))
}

/// Resident bytes of a process now, and at most so far.
pub(crate) fn resident(pid: u32) -> Result<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.trim_end_matches("kB").trim().parse::<u64>().ok());
        kib.map(|kib| kib * 1024).with_context(|| format!("no {name} of {pid}"))
    };
    Ok((field("VmRSS:")?, field("VmHWM:")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_brackets_and_spaces() {
        let stat = "7 (rdk:broker (1)) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 1";
        assert_eq!(parse(stat), Some(("rdk:broker (1)".to_owned(), 2.0)));
    }
}
