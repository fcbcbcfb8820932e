//! The broker: what becomes of messages that are handed to it.

use std::time::Duration;

use outbox_core::Delivery;
use outbox_core::broker::{Outcome, PublishErrorKind};
use outbox_core::delivery::{Failure, Receipt};
use outbox_core::machine::{Input, Time};
use rand::Rng;

use super::{TOPICS, World};

impl World {
    pub(super) fn publish(
        &mut self,
        index: usize,
        life: u64,
        batch: u64,
        all: Vec<(Box<Delivery>, Time)>,
    ) {
        let undecided = self.plan.settings.undecided;
        self.judge_publish(index, batch, &all);
        let together = self.plan.settings.in_key_window > 1;
        let mut wait = Duration::ZERO;
        for (number, (delivery, not_after)) in all.into_iter().enumerate() {
            if number == 0 || !together {
                wait = Duration::from_micros(self.random.random_range(0..=200));
            }
            self.after(wait, move |world| {
                world.hand_over(index, life, batch, number, delivery, not_after);
            });
        }
        self.after(undecided + Duration::from_millis(300), move |world| {
            world.answer(index, life, Input::PublishEnded(batch));
        });
    }

    /// When a message reaches the log: behind what the worker handed over of its key before.
    fn in_line(&mut self, index: usize, delivery: &Delivery) -> Duration {
        let soon = self.latency();
        let (topic, key) = (delivery.message.topic(), delivery.message.key());
        let Some(key) = key else { return soon };
        let line = (topic.to_owned(), key.to_owned());
        let last = self.workers[index].lines.entry(line).or_default();
        *last = (*last).max(self.now + soon);
        *last - self.now
    }

    pub(super) fn is_unreachable(&self, index: usize) -> bool {
        self.broker_down > 0 || self.workers[index].cut
    }

    fn judge_publish(&mut self, index: usize, batch: u64, all: &[(Box<Delivery>, Time)]) {
        let Some(me) = self.workers[index].id else { return };
        let cap = self.plan.settings.rows_in_flight;
        for text in self.workers[index].conduct.publishes(batch, all, cap) {
            self.log.violate(text);
        }
        // Steps of the store's clock shorten leases, and none can be known to have happened.
        if self.plan.clock_steps > 0 {
            return;
        }
        for (delivery, not_after) in all {
            let lease_ends = self.database.granted(me, delivery.lane);
            if lease_ends.is_none_or(|end| *not_after + self.plan.settings.undecided > end) {
                let id = delivery.message.id();
                self.log.violate(format!("too late: {id} may be undecided when its lease ends"));
            }
        }
    }

    fn hand_over(
        &mut self,
        index: usize,
        life: u64,
        batch: u64,
        number: usize,
        delivery: Box<Delivery>,
        not_after: Time,
    ) {
        // A worker that stands still does not hand over; one that crashed never will.
        if self.workers[index].life != life {
            return;
        }
        if self.workers[index].paused {
            return self.after(Duration::from_millis(50), move |world| {
                world.hand_over(index, life, batch, number, delivery, not_after);
            });
        }
        let id = delivery.message.id();
        let undecided = self.plan.settings.undecided;
        let topic = delivery.message.topic();
        let fails = self.rejected.get(&id).copied();
        let unknown_topic = self.plan.unknown_topic && topic == TOPICS[2] && self.storm;
        let soon = self.in_line(index, &delivery);
        let refuse = |kind: PublishErrorKind| Outcome::Failed(kind, Failure::new("test", ""));
        let (append, outcome, wait) = if self.now >= not_after {
            (None, refuse(PublishErrorKind::NotSent), Duration::ZERO)
        } else if self.is_unreachable(index) {
            let kind = if self.random.random_bool(0.5) {
                (PublishErrorKind::Unavailable, soon)
            } else {
                (PublishErrorKind::Unknown, undecided)
            };
            (None, refuse(kind.0), kind.1)
        } else if unknown_topic {
            self.fault();
            (None, refuse(PublishErrorKind::Destination), soon)
        } else if let Some(times) = fails {
            let kind = if times == u32::MAX {
                PublishErrorKind::Rejected
            } else {
                match times {
                    1 => self.rejected.remove(&id),
                    _ => self.rejected.insert(id, times - 1),
                };
                PublishErrorKind::Failed
            };
            self.log.failure(id);
            (None, refuse(kind), soon)
        } else if self.chance(self.plan.broker_faults) {
            self.fault();
            let unknown = refuse(PublishErrorKind::Unknown);
            let late = self.millis(0, 4_000);
            match self.random.random_range(0..4) {
                0 => (None, unknown, undecided),
                // No answer at all: the end of the publish must do.
                1 => (None, unknown, Duration::MAX),
                2 => (Some(soon), unknown, undecided),
                // It travels on though the client has given it up.
                _ => (Some(late), unknown, undecided),
            }
        } else {
            let slow = self.plan.slow_answers && self.random.random_ratio(1, 3);
            let answer = if slow { self.millis(0, 1_500) } else { self.latency() };
            (Some(soon), Outcome::Delivered(Receipt::default()), soon + answer)
        };
        if matches!(outcome, Outcome::Failed(PublishErrorKind::Unknown, _)) {
            self.log.ambiguous();
        }
        if let Some(append) = append {
            self.after(append, move |world| {
                world.note(|| format!("log: {id}"));
                world.log.append(id);
            });
        }
        if wait < Duration::MAX {
            let input = Input::Answered(batch, vec![(number, outcome)]);
            self.after(wait, move |world| world.answer(index, life, input));
        }
        let attempts = delivery.state.attempts;
        if attempts > self.log.counted(id) {
            self.log.violate(format!("attempts: {attempts} are counted for {id}"));
        }
    }
}
