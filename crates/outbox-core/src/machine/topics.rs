//! What is known of each topic: its policy, its share of the window, whether it waits.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::Time;
use super::keys::KeyId;
use crate::retry::{RetryPolicy, TopicPolicy};

const FIRST_PROBE: Duration = Duration::from_millis(500);
const LAST_PROBE: Duration = Duration::from_secs(30);
/// A message that waits longer for its answer makes its topic slow.
pub(super) const SLOW: Duration = Duration::from_secs(1);
/// However often a topic timed out, this many of its messages may be outstanding.
const SMALLEST_SHARE: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct TopicId(u32);

#[derive(Debug, Clone)]
pub(super) struct Topics {
    by_name: HashMap<Arc<str>, TopicId>,
    all: Vec<Topic>,
    policies: HashMap<String, TopicPolicy>,
    /// Of topics that have none of their own.
    retry: RetryPolicy,
    largest_share: usize,
    /// When it was last looked which topics are slow, and the first batch that came later.
    aged_at: Time,
    age_batch: u64,
}

#[derive(Debug, Clone)]
pub(super) struct Topic {
    pub(super) name: Arc<str>,
    pub(super) policy: TopicPolicy,
    /// Messages at the broker without an answer.
    pub(super) offered: usize,
    /// Bytes of them.
    pub(super) offered_bytes: usize,
    /// How many of its messages may be outstanding. Halved after a timeout, grows with answers.
    share: usize,
    halved_at: Option<Time>,
    /// Messages of those offered that were sent before it was last looked which topics are slow.
    old: usize,
    /// One of them had waited for its answer all the time since it was looked before.
    slow: bool,
    /// The destination is unknown or forbidden: single messages probe.
    closed: Option<Closed>,
    /// Its entries among the keys that are ready, stale ones included.
    pub(super) ready: usize,
    /// Keys that could send if the topic let them.
    stalled: VecDeque<KeyId>,
    /// So many of them, from the first on, were asked to give their content up.
    bare: usize,
}

#[derive(Debug, Clone, Copy)]
struct Closed {
    since: Time,
    probe_at: Time,
    wait: Duration,
    probing: bool,
}

impl Topics {
    pub(super) fn new(
        policies: HashMap<String, TopicPolicy>,
        retry: RetryPolicy,
        largest_share: usize,
    ) -> Self {
        let largest_share = largest_share.max(1);
        Self {
            by_name: HashMap::new(),
            all: Vec::new(),
            policies,
            retry,
            largest_share,
            aged_at: Time::ZERO,
            age_batch: 0,
        }
    }

    /// The id of a topic that was met before.
    pub(super) fn known(&self, name: &str) -> Option<TopicId> {
        match &*self.all {
            [only] if *only.name == *name => Some(TopicId(0)),
            _ => self.by_name.get(name).copied(),
        }
    }

    pub(super) fn id(&mut self, name: &str) -> TopicId {
        if let Some(id) = self.known(name) {
            return id;
        }
        let id = TopicId(self.all.len() as u32);
        let name: Arc<str> = name.into();
        self.by_name.insert(Arc::clone(&name), id);
        self.all.push(Topic {
            policy: self.policies.get(&*name).copied().unwrap_or_default(),
            name,
            offered: 0,
            offered_bytes: 0,
            share: self.largest_share,
            halved_at: None,
            old: 0,
            slow: false,
            closed: None,
            ready: 0,
            stalled: VecDeque::new(),
            bare: 0,
        });
        id
    }

    pub(super) fn get(&self, id: TopicId) -> &Topic {
        &self.all[id.0 as usize]
    }

    /// The topic's own retry policy, or else that of all.
    pub(super) fn retry(&self, id: TopicId) -> RetryPolicy {
        self.get(id).policy.retry.unwrap_or(self.retry)
    }

    pub(super) fn get_mut(&mut self, id: TopicId) -> &mut Topic {
        &mut self.all[id.0 as usize]
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = TopicId> + use<> {
        (0..self.all.len() as u32).map(TopicId)
    }

    /// The next moment at which a closed topic may be probed.
    pub(super) fn probe_at(&self) -> Option<Time> {
        let waiting = self.all.iter().filter(|topic| !topic.stalled.is_empty());
        waiting.filter_map(|t| t.closed).filter(|c| !c.probing).map(|c| c.probe_at).min()
    }

    /// Looks once a second which topics have a message that got no answer since the last time.
    pub(super) fn age(&mut self, next_batch: u64, now: Time) {
        if now.saturating_sub(self.aged_at) < SLOW {
            return;
        }
        (self.aged_at, self.age_batch) = (now, next_batch);
        for topic in &mut self.all {
            topic.slow = topic.old > 0;
            topic.old = topic.offered;
        }
    }

    /// A message of this batch was answered.
    pub(super) fn answered(&mut self, id: TopicId, batch: u64, bytes: usize) {
        let is_old = batch < self.age_batch;
        let topic = self.get_mut(id);
        topic.offered -= 1;
        topic.offered_bytes -= bytes;
        topic.old -= usize::from(is_old);
        topic.slow &= topic.old > 0;
    }

    pub(super) fn acknowledged(&mut self, id: TopicId) -> bool {
        let largest = self.largest_share;
        let topic = self.get_mut(id);
        topic.share = (topic.share + 1).min(largest);
        topic.closed.take().is_some()
    }
}

impl Topic {
    pub(super) fn is_closed(&self) -> bool {
        self.closed.is_some()
    }

    pub(super) fn closed_since(&self) -> Option<Time> {
        self.closed.map(|closed| closed.since)
    }

    /// A key waits until the topic lets it send.
    pub(super) fn stall(&mut self, id: KeyId) {
        self.stalled.push_back(id);
    }

    /// The key that has waited longest.
    pub(super) fn next_stalled(&mut self) -> Option<KeyId> {
        self.bare = self.bare.saturating_sub(1);
        self.stalled.pop_front()
    }

    /// The keys that began to wait since this was asked last.
    pub(super) fn newly_stalled(&mut self) -> Vec<KeyId> {
        let bare = std::mem::replace(&mut self.bare, self.stalled.len());
        self.stalled.range(bare..).copied().collect()
    }

    /// Whether another message of this topic may be sent.
    pub(super) fn allows(&self, bytes_share: usize, now: Time) -> bool {
        match self.closed {
            Some(closed) => !closed.probing && closed.probe_at <= now,
            None => self.offered < self.share && self.offered_bytes < bytes_share,
        }
    }

    /// How many more of its keys may join those that are ready.
    pub(super) fn room(&self) -> usize {
        self.share.saturating_sub(self.offered + self.ready)
    }

    pub(super) fn sent(&mut self, bytes: usize) {
        self.offered += 1;
        self.offered_bytes += bytes;
        if let Some(closed) = &mut self.closed {
            closed.probing = true;
        }
    }

    /// A message may have timed out: the share is halved, at most once per `undecided`.
    pub(super) fn timed_out(&mut self, now: Time, undecided: Duration) {
        if self.halved_at.is_none_or(|at| now.saturating_sub(at) >= undecided) {
            self.halved_at = Some(now);
            self.share = (self.share / 2).max(SMALLEST_SHARE).min(self.share);
        }
    }

    /// The destination is unknown or forbidden. Tells whether this is news.
    pub(super) fn close(&mut self, now: Time, random: f64) -> bool {
        let news = self.closed.is_none();
        let wait = self.closed.map_or(FIRST_PROBE, |closed| (closed.wait * 2).min(LAST_PROBE));
        let since = self.closed.map_or(now, |closed| closed.since);
        if news || self.closed.is_some_and(|closed| closed.probing) {
            let probe_at = now + wait.mul_f64(0.5 + 0.5 * random);
            self.closed = Some(Closed { since, probe_at, wait, probing: false });
        }
        news
    }

    /// The probe ended without telling anything about the destination.
    pub(super) fn inconclusive(&mut self) {
        if let Some(closed) = &mut self.closed {
            closed.probing = false;
        }
    }

    /// Whether its messages should not fill the window that other topics need.
    pub(super) fn is_congested(&self) -> bool {
        self.closed.is_some() || self.slow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNDECIDED: Duration = Duration::from_secs(20);

    #[test]
    fn a_topic_never_takes_more_than_its_share_and_a_timeout_halves_it_once() {
        let mut topics = Topics::new(HashMap::new(), RetryPolicy::default(), 100);
        let id = topics.id("t");
        let now = Duration::from_secs(1);
        for _ in 0..50 {
            topics.get_mut(id).sent(10);
        }
        assert!(topics.get(id).allows(1_000, now));
        topics.get_mut(id).timed_out(now, UNDECIDED);
        topics.get_mut(id).timed_out(now, UNDECIDED);
        assert!(!topics.get(id).allows(1_000, now), "50 outstanding, a share of 50");
        topics.acknowledged(id);
        assert!(topics.get(id).allows(1_000, now));
        assert!(!topics.get(id).allows(500, now), "its bytes are used up");
    }

    #[test]
    fn a_closed_topic_is_probed_by_one_message_at_a_time() {
        let mut topics = Topics::new(HashMap::new(), RetryPolicy::default(), 100);
        let id = topics.id("t");
        let topic = topics.get_mut(id);
        assert!(topic.close(Duration::ZERO, 1.0));
        assert!(!topic.close(Duration::ZERO, 1.0));
        assert!(!topic.allows(1_000, Duration::from_millis(499)));
        assert!(topic.allows(1_000, Duration::from_millis(500)));
        topic.sent(1);
        assert!(!topic.allows(1_000, Duration::from_secs(60)));
        topics.answered(id, 0, 1);
        let topic = topics.get_mut(id);
        topic.close(Duration::from_secs(1), 1.0);
        assert!(!topic.allows(1_000, Duration::from_millis(1_999)));
        assert!(topics.acknowledged(id));
        assert!(topics.get(id).allows(1_000, Duration::ZERO));
    }

    #[test]
    fn a_topic_is_slow_while_a_message_waits_for_longer_than_a_second() {
        let mut topics = Topics::new(HashMap::new(), RetryPolicy::default(), 100);
        let id = topics.id("t");
        let second = |n| Duration::from_secs(n);
        topics.get_mut(id).sent(1);
        topics.age(1, second(1));
        assert!(!topics.get(id).is_congested(), "it may have been sent just now");
        for batch in 1..4 {
            topics.get_mut(id).sent(1);
            topics.answered(id, batch, 1);
            topics.age(batch + 1, second(1 + batch));
            assert!(topics.get(id).is_congested(), "answers to others do not help the first");
        }
        topics.answered(id, 0, 1);
        assert!(!topics.get(id).is_congested());
    }
}
