//! The broker's log, and the oracle that judges it.

use std::collections::{BTreeMap, BTreeSet};

use outbox_core::MessageId;

/// Everything the oracle must know to judge a run.
#[derive(Debug, Default)]
pub(super) struct Log {
    /// Every appearance, in the order of the log.
    appearances: Vec<MessageId>,
    /// Committed messages with their order group and their place in its commit order.
    committed: BTreeMap<MessageId, (Option<String>, usize)>,
    commits: BTreeMap<String, usize>,
    /// Counted failures that the broker answered, by message.
    answered_failures: BTreeMap<MessageId, u32>,
    /// Answers whose outcome was unknown: each allows one more appearance.
    ambiguous: usize,
    violations: BTreeSet<String>,
}

impl Log {
    pub(super) fn commit(&mut self, id: MessageId, group: Option<String>) {
        let place = match &group {
            Some(group) => {
                let next = self.commits.entry(group.clone()).or_default();
                *next += 1;
                *next
            }
            None => 0,
        };
        self.committed.insert(id, (group, place));
    }

    pub(super) fn append(&mut self, id: MessageId) {
        if !self.committed.contains_key(&id) {
            self.violations.insert(format!("ghost: {id} was published and never committed"));
        }
        self.appearances.push(id);
    }

    pub(super) fn ambiguous(&mut self) {
        self.ambiguous += 1;
    }

    pub(super) fn failure(&mut self, id: MessageId) {
        *self.answered_failures.entry(id).or_default() += 1;
    }

    /// Whether the broker failed anything, or left it unknown.
    pub(super) fn has_failures(&self) -> bool {
        self.ambiguous > 0 || !self.answered_failures.is_empty()
    }

    pub(super) fn violate(&mut self, text: String) {
        self.violations.insert(text);
    }

    pub(super) fn contains(&self, id: MessageId) -> bool {
        self.appearances.contains(&id)
    }

    pub(super) fn counted(&self, id: MessageId) -> u32 {
        self.answered_failures.get(&id).copied().unwrap_or(0)
    }

    pub(super) fn committed(&self) -> usize {
        self.committed.len()
    }

    pub(super) fn appearances(&self) -> usize {
        self.appearances.len()
    }

    pub(super) fn repeated(&self) -> usize {
        let distinct: BTreeSet<_> = self.appearances.iter().collect();
        self.appearances.len() - distinct.len()
    }

    pub(super) fn missing(&self, dead: &BTreeSet<MessageId>) -> Vec<MessageId> {
        let appeared: BTreeSet<_> = self.appearances.iter().collect();
        let gone = |id: &&MessageId| !appeared.contains(*id) && !dead.contains(*id);
        self.committed.keys().filter(gone).copied().collect()
    }

    /// First appearances of one (topic, key) follow commit order; dead ones are exempt.
    pub(super) fn judge_order(&mut self, dead: &BTreeSet<MessageId>) {
        let mut seen = BTreeSet::new();
        let mut last: BTreeMap<&str, usize> = BTreeMap::new();
        let mut wrong = Vec::new();
        for id in &self.appearances {
            if dead.contains(id) || !seen.insert(*id) {
                continue;
            }
            let Some((Some(group), place)) = self.committed.get(id) else { continue };
            let before = last.insert(group, *place).unwrap_or(0);
            if before > *place {
                wrong.push(format!("disorder: {group} {place} appeared after {before}"));
            }
        }
        self.violations.extend(wrong);
    }

    pub(super) fn judge_repeats(&mut self, cap: usize, faults: usize) {
        let (repeated, bound) = (self.repeated(), cap * faults + self.ambiguous);
        if repeated > bound {
            self.violations.insert(format!("repeated: {repeated} times, the bound is {bound}"));
        }
    }

    pub(super) fn take_violations(&mut self) -> Vec<String> {
        std::mem::take(&mut self.violations).into_iter().collect()
    }
}
