//! What was committed against what appeared.

use std::collections::{HashMap, HashSet};
use std::fmt;

use anyhow::{Context, Result, ensure};
use outbox_core::MessageId;
use outbox_testing::Published;

/// One message of an aggregate: its place in the order in which the aggregate's messages were
/// committed. The payload says the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Entry {
    pub(crate) aggregate: u32,
    pub(crate) sequence: u64,
}

impl Entry {
    pub(crate) fn payload(self) -> String {
        format!("{}:{}", self.aggregate, self.sequence)
    }

    fn of(payload: &[u8]) -> Option<Self> {
        let (aggregate, sequence) = std::str::from_utf8(payload).ok()?.split_once(':')?;
        Some(Self { aggregate: aggregate.parse().ok()?, sequence: sequence.parse().ok()? })
    }
}

/// A record of a topic.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Appearance {
    pub(crate) id: MessageId,
    pub(crate) partition: i32,
    pub(crate) entry: Entry,
}

impl Appearance {
    /// # Errors
    ///
    /// When the payload is none of a writer's, or belongs to another key.
    pub(crate) fn of(record: &Published) -> Result<Self> {
        let entry = record.payload.as_deref().and_then(Entry::of).context("payload is mangled")?;
        let key = record.key.as_deref().unwrap_or_default();
        ensure!(key == entry.aggregate.to_string().as_bytes(), "key is another's: {key:?}");
        Ok(Self { id: record.message_id, partition: record.partition, entry })
    }
}

/// What is wrong with what appeared; duplicates are wrong only where no fault excuses them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Committed, and never appeared.
    pub(crate) lost: usize,
    /// Appeared, and were not committed, or not with this content.
    pub(crate) ghosts: usize,
    /// Appeared first after a later one of their key had appeared, or in another partition.
    pub(crate) disordered: usize,
    /// Appearances beyond the first.
    pub(crate) duplicates: usize,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lost, ghosts, disordered, duplicates } = self;
        write!(f, "{lost} lost, {ghosts} ghosts, {disordered} disordered, {duplicates} duplicates")
    }
}

/// What a topic holds, measured by the ledger.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) committed: usize,
    pub(crate) records: usize,
    pub(crate) verdict: Verdict,
}

impl Report {
    /// Fails for every loss, ghost and disorder, and for more duplicates than faults excuse.
    pub(crate) fn check(&self, excused: usize) -> Result<()> {
        let duplicates = self.verdict.duplicates;
        ensure!(duplicates <= excused, "{self}, of which {excused} are excused");
        let others = Verdict { duplicates: 0, ..self.verdict };
        ensure!(others == Verdict::default(), "{self}");
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { committed, records, verdict } = self;
        write!(f, "{committed} committed, {records} records: {verdict}")
    }
}

/// Judges the records of a topic, those of a partition in the order of their offsets.
pub(crate) fn judge(committed: &HashMap<MessageId, Entry>, appearances: &[Appearance]) -> Verdict {
    let mut verdict = Verdict::default();
    let mut seen = HashSet::new();
    let mut newest: HashMap<u32, (i32, u64)> = HashMap::new();
    for appearance in appearances {
        let Appearance { id, partition, entry } = *appearance;
        if committed.get(&id) != Some(&entry) {
            verdict.ghosts += 1;
            continue;
        }
        if !seen.insert(id) {
            verdict.duplicates += 1;
            continue;
        }
        let (home, last) = newest.entry(entry.aggregate).or_insert((partition, 0));
        if *home != partition || entry.sequence <= *last {
            verdict.disordered += 1;
            println!(
                "aggregate {}: {id} is {} after {last}, in partition {partition} (home {home})",
                entry.aggregate, entry.sequence
            );
        }
        *last = entry.sequence.max(*last);
    }
    verdict.lost = committed.len() - seen.len();
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u8) -> MessageId {
        MessageId::from_bytes([number; 16])
    }

    fn appearance(number: u8, aggregate: u32, sequence: u64) -> Appearance {
        Appearance { id: id(number), partition: 0, entry: Entry { aggregate, sequence } }
    }

    /// Two messages of aggregate 1, one of aggregate 2.
    fn committed() -> HashMap<MessageId, Entry> {
        good().iter().map(|a| (a.id, a.entry)).collect()
    }

    fn good() -> [Appearance; 3] {
        [appearance(1, 1, 1), appearance(2, 1, 2), appearance(3, 2, 1)]
    }

    #[test]
    fn a_good_history_has_no_fault_in_any_order_of_its_keys() {
        let [first, second, other] = good();
        for history in [[first, second, other], [first, other, second], [other, first, second]] {
            assert_eq!(judge(&committed(), &history), Verdict::default());
        }
    }

    #[test]
    fn a_loss_is_found() {
        let [first, _, other] = good();
        let verdict = judge(&committed(), &[first, other]);
        assert_eq!(verdict, Verdict { lost: 1, ..Verdict::default() });
    }

    #[test]
    fn a_ghost_is_found_rolled_back_or_with_the_content_of_another() {
        for ghost in [appearance(9, 1, 3), appearance(1, 1, 2)] {
            let history: Vec<_> = good().into_iter().chain([ghost]).collect();
            let verdict = judge(&committed(), &history);
            assert_eq!(verdict, Verdict { ghosts: 1, ..Verdict::default() }, "{ghost:?}");
        }
    }

    #[test]
    fn a_disorder_is_found_even_if_the_older_one_then_comes_again() {
        let [first, second, other] = good();
        let verdict = judge(&committed(), &[second, first, other]);
        assert_eq!(verdict, Verdict { disordered: 1, ..Verdict::default() });
        let verdict = judge(&committed(), &[second, first, second, other]);
        assert_eq!(verdict, Verdict { disordered: 1, duplicates: 1, ..Verdict::default() });
    }

    #[test]
    fn a_key_in_two_partitions_is_a_disorder() {
        let [first, second, other] = good();
        let verdict = judge(&committed(), &[first, Appearance { partition: 1, ..second }, other]);
        assert_eq!(verdict, Verdict { disordered: 1, ..Verdict::default() });
    }

    #[test]
    fn a_duplicate_is_counted_and_may_come_after_a_newer_one() {
        let [first, second, other] = good();
        let verdict = judge(&committed(), &[first, second, first, second, other]);
        assert_eq!(verdict, Verdict { duplicates: 2, ..Verdict::default() });
    }

    #[test]
    fn a_payload_says_where_its_message_belongs() {
        let entry = Entry { aggregate: 7, sequence: 42 };
        assert_eq!(Entry::of(entry.payload().as_bytes()), Some(entry));
        assert_eq!(Entry::of(b"7"), None);
    }
}
