//! What a run promised against what it did. Pure.

mod recovery;

use std::{collections::HashMap, time::Duration};

use outbox_core::MessageId;

use crate::{
    entry::Entry,
    history::{Attempt, Outcome},
};

pub(crate) use recovery::{LIMIT, Recovery};

/// A record of a topic, those of a partition in the order of their offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Appearance {
    pub(crate) id: MessageId,
    pub(crate) partition: i32,
    /// `None` when key and payload are no writer's.
    pub(crate) entry: Option<Entry>,
    /// When it was read, since the run began.
    pub(crate) at: Duration,
}

/// A fault that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Befallen {
    pub(crate) class: String,
    /// Since the run began, as the next one.
    pub(crate) began: Duration,
    pub(crate) healed: Duration,
}

/// What excuses repeated messages: the bound that the README promises, in its terms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Excuses {
    /// Rows that a relay may have in flight.
    pub(crate) window: usize,
    /// Faults, each counted once for every relay that it struck.
    pub(crate) faults: usize,
    /// How often a living relay lost lanes.
    pub(crate) leases_lost: usize,
    /// Answers of the broker that left open what became of a message.
    pub(crate) ambiguous: usize,
}

impl Excuses {
    pub(crate) fn total(&self) -> usize {
        self.window * (self.faults + self.leases_lost) + self.ambiguous
    }
}

/// Everything that is known of a run.
#[derive(Debug, Default)]
pub(crate) struct Run {
    /// What writers tried, as they know it.
    pub(crate) attempts: Vec<Attempt>,
    /// The business table at the end: exactly what was committed.
    pub(crate) committed: HashMap<MessageId, Entry>,
    /// The records of the ordered topic.
    pub(crate) appearances: Vec<Appearance>,
    /// The records of the topic beside it, as it was last created.
    pub(crate) beside: Vec<Appearance>,
    /// When that topic was last created, in microseconds of the machine's clock.
    pub(crate) beside_created: u64,
    pub(crate) faults: Vec<Befallen>,
    pub(crate) excuses: Excuses,
    /// Rows left in the outbox when the time to drain it was over.
    pub(crate) left: usize,
    /// Dead letters, and rows that are held or have attempts counted: no fault here allows any.
    pub(crate) blamed: usize,
    /// Writers and relays that ended though nobody ended them.
    pub(crate) fell: usize,
}

/// What the checker found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Findings {
    pub(crate) committed: usize,
    /// Of the committed ones, those that must appear: see [`judge`].
    pub(crate) judged: usize,
    /// Outcomes of the messages that writers tried.
    pub(crate) ok: usize,
    pub(crate) failed: usize,
    pub(crate) unknown: usize,
    /// Of the unknown ones, those that were committed.
    pub(crate) unknown_committed: usize,
    pub(crate) records: usize,
    /// Committed, and never appeared.
    pub(crate) lost: usize,
    /// Appeared, and were not committed, or not with this content.
    pub(crate) ghosts: usize,
    /// Appearances beyond the first.
    pub(crate) duplicates: usize,
    pub(crate) excused: usize,
    /// Appeared first after a later one of their key had appeared, or in another partition.
    pub(crate) disordered: usize,
    /// Confirmed by the database, and not in its table.
    pub(crate) forgotten: usize,
    /// In the table, though COMMIT was never sent, or nobody tried it.
    pub(crate) unexplained: usize,
    pub(crate) left: usize,
    pub(crate) blamed: usize,
    pub(crate) fell: usize,
    /// From a fault's healing to the next first appearance.
    pub(crate) recovery: Recovery,
}

/// Judges a run.
///
/// The topic beside the ordered one loses what it holds when it is deleted. Its messages are
/// therefore judged as all others only if their transaction began after it was last created: all
/// their appearances are in what it holds now. Older ones must only be no ghosts.
pub(crate) fn judge(run: &Run) -> Findings {
    let mut findings = Findings {
        committed: run.committed.len(),
        records: run.appearances.len() + run.beside.len(),
        excused: run.excuses.total(),
        left: run.left,
        blamed: run.blamed,
        fell: run.fell,
        ..Findings::default()
    };
    let tried = findings.compare_with_writers(run);
    let is_old = |id: &MessageId| tried.get(id).is_none_or(|began| *began < run.beside_created);
    let is_judged = |id: &MessageId, entry: Entry| entry.is_ordered() || !is_old(id);

    let expected = |entry: Entry| entry.is_ordered();
    let ordered = Reading::of(&run.appearances, &run.committed, expected, is_judged);
    let expected = |entry: Entry| !entry.is_ordered();
    let beside = Reading::of(&run.beside, &run.committed, expected, is_judged);
    for reading in [&ordered, &beside] {
        findings.ghosts += reading.ghosts;
        findings.duplicates += reading.duplicates;
        findings.disordered += reading.disordered;
    }
    let is_seen = |id: &MessageId| ordered.first.contains_key(id) || beside.first.contains_key(id);
    let judged = run.committed.iter().filter(|(id, entry)| is_judged(id, **entry));
    findings.judged = judged.clone().count();
    findings.lost = judged.filter(|(id, _)| !is_seen(id)).count();
    findings.recovery = Recovery::of(&run.faults, ordered.first.values().copied().collect());
    findings
}

/// What the records of a topic show.
#[derive(Debug, Default)]
struct Reading {
    /// When each message that is judged appeared first.
    first: HashMap<MessageId, Duration>,
    ghosts: usize,
    duplicates: usize,
    disordered: usize,
}

impl Reading {
    fn of(
        appearances: &[Appearance],
        committed: &HashMap<MessageId, Entry>,
        belongs: impl Fn(Entry) -> bool,
        is_judged: impl Fn(&MessageId, Entry) -> bool,
    ) -> Self {
        let mut reading = Self::default();
        let mut newest: HashMap<u32, (i32, u64)> = HashMap::new();
        for appearance in appearances {
            let Appearance { id, partition, entry, at } = *appearance;
            let entry = entry.filter(|entry| committed.get(&id) == Some(entry) && belongs(*entry));
            let Some(entry) = entry else {
                reading.ghosts += 1;
                continue;
            };
            if !is_judged(&id, entry) {
                continue;
            }
            if reading.first.contains_key(&id) {
                reading.duplicates += 1;
                continue;
            }
            reading.first.insert(id, at);
            let (home, last) = newest.entry(entry.aggregate).or_insert((partition, 0));
            if *home != partition || entry.sequence <= *last {
                reading.disordered += 1;
            }
            *last = entry.sequence.max(*last);
        }
        reading
    }
}

impl Findings {
    /// Counts outcomes, and compares them with the table. When each message was tried.
    fn compare_with_writers(&mut self, run: &Run) -> HashMap<MessageId, u64> {
        let mut tried = HashMap::with_capacity(run.attempts.len());
        for attempt in &run.attempts {
            tried.insert(attempt.id, attempt.began);
            let is_there = run.committed.get(&attempt.id) == Some(&attempt.entry);
            match attempt.outcome {
                Outcome::Ok => {
                    self.ok += 1;
                    self.forgotten += usize::from(!is_there);
                }
                Outcome::Failed => {
                    self.failed += 1;
                    self.unexplained += usize::from(is_there);
                }
                Outcome::Unknown => {
                    self.unknown += 1;
                    self.unknown_committed += usize::from(is_there);
                }
            }
        }
        self.unexplained += run.committed.keys().filter(|id| !tried.contains_key(*id)).count();
        tried
    }
}

impl Findings {
    /// What must not be, in words; none in a good run.
    pub(crate) fn violations(&self) -> Vec<String> {
        let excess = self.duplicates.saturating_sub(self.excused);
        let counts = [
            (self.lost, "committed and never appeared"),
            (self.ghosts, "appeared and were not committed"),
            (self.disordered, "appeared first after a later one of their key"),
            (excess, "repeated beyond the bound"),
            (self.forgotten, "confirmed by the database and not in its table"),
            (self.unexplained, "in the table though nobody sent their COMMIT"),
            (self.left, "still in the outbox"),
            (self.blamed, "held, dead or with an attempt counted"),
        ];
        let mut violations: Vec<_> = counts
            .into_iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{count} messages {what}"))
            .collect();
        if self.fell > 0 {
            violations.push(format!("{} processes ended by themselves", self.fell));
        }
        if self.committed == 0 {
            violations.push("nothing was committed: the run shows nothing".into());
        }
        let late = self.recovery.late.iter().map(|class| {
            format!("nothing was delivered within {} s of the end of: {class}", LIMIT.as_secs())
        });
        violations.extend(late);
        violations
    }
}

#[cfg(test)]
mod tests;
