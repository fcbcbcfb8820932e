//! What tells one state of the machine from another: for model checking.

use std::fmt::{self, Debug, Write};
use std::hash::{DefaultHasher, Hasher};

use super::{Machine, Map};

impl Machine {
    /// A hash of all that decides what the machine does next, apart from the jitter to come.
    /// Machines that differ in nothing have the same; events that nobody took do not count.
    pub fn fingerprint(&self) -> u64 {
        let mut text = Text(DefaultHasher::new());
        let written = self.write_state(&mut text);
        debug_assert!(written.is_ok(), "a hasher takes everything");
        text.0.finish()
    }

    fn write_state(&self, text: &mut Text) -> fmt::Result {
        let flags = [
            self.releasing,
            self.turn,
            self.caught_up,
            self.full,
            self.checked,
            self.checking,
            self.purging,
            self.counting,
        ];
        let times = [
            self.keep_at,
            self.watch_at,
            self.scan_at,
            self.check_at,
            self.purge_at,
            self.count_at,
            self.counted_at,
            self.last_progress,
            self.published_at,
        ];
        write!(text, "{flags:?}{times:?}{:?}{:?}", self.stage, self.server)?;
        write!(text, "{:?}{:?}{:?}", self.leases, self.keeping, self.keep_failing)?;
        write!(text, "{:?}{:?}{:?}{}", self.horizon, self.pace, self.claiming, self.claims)?;
        write!(text, "{:?}{:?}{:?}", self.claim_failing, self.fresh_lanes, self.catch_up)?;
        write!(text, "{:?}{:?}{}", self.recheck, self.watch_after, self.typical_bytes)?;
        write!(text, "{} {} {}", self.smaller, self.scan_width, self.given_up)?;
        write!(text, "{:?} {}", self.sweep_after, self.part_width)?;
        sorted(text, &self.lanes)?;
        sorted(text, &self.rows)?;
        sorted(text, &self.keys)?;
        write!(text, "{:?}{:?}{:?}", self.scan_after, self.ready, self.thirsty)?;
        write!(text, "{:?}{:?}", self.stalled_by_lane, self.watched)?;
        let mut parked: Vec<_> = self.parked.iter().collect();
        parked.sort_unstable();
        write!(text, "{parked:?}{:?}{:?}", self.circuit, self.batches)?;
        write!(text, "{}{}{:?}", self.next_batch, self.offered, self.backlog)?;
        let topics: Vec<_> = self.topics.ids().map(|id| self.topics.get(id)).collect();
        write!(text, "{topics:?}{:?}{:?}", self.unsettled, self.fading)
    }
}

fn sorted<K: Ord + Debug, V: Debug>(text: &mut Text, map: &Map<K, V>) -> fmt::Result {
    let mut entries: Vec<(&K, &V)> = map.iter().collect();
    entries.sort_unstable_by_key(|(key, _)| *key);
    write!(text, "{entries:?}")
}

/// Text that is hashed instead of kept.
struct Text(DefaultHasher);

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}
