//! What a worker may do, judged by what it was told: rules that hold whatever the faults.

use std::collections::{BTreeMap, BTreeSet};

use outbox_core::broker::Outcome;
use outbox_core::machine::{Input, SettleOrder, Time};
use outbox_core::{Delivery, MessageId};

/// One life of a worker, from its start to its crash or its end.
#[derive(Debug, Default)]
pub(super) struct Conduct {
    /// Messages of each publish that are not answered yet.
    publishes: BTreeMap<u64, Vec<Option<MessageId>>>,
    /// How many delivered rows each settle has that is not confirmed.
    settles: BTreeMap<u64, isize>,
    /// Rows of all settles so far, with the attempts to record of those that failed.
    settled: BTreeSet<(MessageId, Option<u32>)>,
    acknowledged: BTreeSet<MessageId>,
    /// Published, and neither failed nor confirmed settled.
    in_flight: isize,
}

impl Conduct {
    /// The worker publishes; tells what it must not do.
    pub(super) fn publishes(
        &mut self,
        batch: u64,
        all: &[(Box<Delivery>, Time)],
        cap: usize,
    ) -> Vec<String> {
        let mut wrong = Vec::new();
        for (delivery, _) in all {
            let id = delivery.message.id();
            if self.acknowledged.contains(&id) {
                wrong.push(format!("again: {id} is sent by a worker that knows it as delivered"));
            }
            if delivery.state.held {
                wrong.push(format!("held: {id} is sent though it waits for an operator"));
            }
        }
        self.in_flight += all.len() as isize;
        if self.in_flight > cap as isize {
            wrong.push(format!("in flight: {} messages, the cap is {cap}", self.in_flight));
        }
        let ids = all.iter().map(|(delivery, _)| Some(delivery.message.id()));
        self.publishes.insert(batch, ids.collect());
        wrong
    }

    /// The worker settles; tells whether it keeps from the store that it does so again. What took too
    /// long it may divide: the parts have new numbers, and what failed under a lease that ran out
    /// may fail once more.
    pub(super) fn settles(&mut self, number: u64, order: &SettleOrder) -> Option<String> {
        let request = order.request();
        let delivered = request.delivered.iter().map(|row| (row.id.message, None));
        let failed = request.failed.iter().map(|row| (row.id.message, Some(row.attempts)));
        let known = self.settles.insert(number, request.delivered.len() as isize).is_some();
        let again = known || delivered.clone().any(|row| self.settled.contains(&row));
        let rows: Vec<_> = delivered.chain(failed).collect();
        let new = !rows.iter().any(|row| self.settled.contains(row));
        self.settled.extend(rows);
        let wrong = if request.repeated { new } else { again };
        wrong.then(|| format!("settle: {number} tells of its repetition: {}", request.repeated))
    }

    /// Messages at the broker without an answer.
    pub(super) fn unanswered(&self) -> usize {
        self.publishes.values().flatten().flatten().count()
    }

    /// The worker is told something.
    pub(super) fn hears(&mut self, input: &Input) {
        match input {
            Input::Answered(batch, answers) => {
                for (index, outcome) in answers {
                    self.answered(*batch, *index, outcome);
                }
            }
            Input::PublishEnded(batch) => {
                let open = self.publishes.remove(batch).unwrap_or_default();
                self.in_flight -= open.iter().flatten().count() as isize;
            }
            Input::Closed => {
                self.in_flight -= self.unanswered() as isize;
                self.publishes.clear();
            }
            Input::Settled(number, Ok(_)) => {
                self.in_flight -= self.settles.remove(number).unwrap_or(0);
            }
            _ => {}
        }
    }

    /// Only the first answer of a message counts, and none after the publish has ended.
    fn answered(&mut self, batch: u64, index: usize, outcome: &Outcome) {
        let publish = self.publishes.get_mut(&batch);
        let Some(id) = publish.and_then(|ids| ids.get_mut(index)?.take()) else { return };
        match outcome {
            Outcome::Delivered(_) => {
                self.acknowledged.insert(id);
            }
            _ => self.in_flight -= 1,
        }
    }
}
