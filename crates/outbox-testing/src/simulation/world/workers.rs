//! Workers: the shipped machines, what they are told, and what they want done.

use std::num::NonZeroU16;

use outbox_core::WorkerId;
use outbox_core::broker::PublishErrorKind;
use outbox_core::machine::{Action, Input, Machine};
use outbox_core::store::{Backlog, KeepLeases, Release, StoreProfile};
use rand::Rng;

use super::{FRAMING, LARGE, World};
use crate::simulation::conduct::Conduct;

impl World {
    pub(super) fn start(&mut self, index: usize) {
        let lanes = NonZeroU16::new(self.plan.lanes).unwrap_or(NonZeroU16::MIN);
        let profile = StoreProfile::new(lanes);
        let profile = if self.plan.in_commit_order { profile.in_commit_order() } else { profile };
        let mut settings = self.plan.settings.clone();
        let id: [u8; 16] = self.random.random();
        settings.worker = WorkerId::from_bytes(id);
        settings.seed = self.random.random();
        let worker = &mut self.workers[index];
        worker.id = Some(settings.worker);
        worker.machine = Some(Machine::new(settings, profile, self.now));
        self.note(|| format!("worker {index} starts"));
        self.act(index);
    }

    pub(super) fn crash(&mut self, index: usize) {
        if self.workers[index].machine.is_none() {
            return;
        }
        self.note(|| format!("worker {index} crashes"));
        self.fault();
        self.stop(index);
    }

    fn stop(&mut self, index: usize) {
        let worker = &mut self.workers[index];
        worker.machine = None;
        worker.life += 1;
        worker.inbox.clear();
        worker.conduct = Conduct::default();
        let wait = self.millis(0, 9_000);
        self.after(wait, move |world| {
            if world.workers[index].machine.is_none() {
                world.start(index);
            }
        });
    }

    pub(super) fn pause(&mut self, index: usize) {
        if self.workers[index].machine.is_none() || self.workers[index].paused {
            return;
        }
        self.fault();
        let long = self.millis(100, 15_000);
        self.note(|| format!("worker {index} stands still for {long:?}"));
        self.workers[index].paused = true;
        self.after(long, move |world| {
            world.note(|| format!("worker {index} goes on"));
            world.workers[index].paused = false;
            for input in std::mem::take(&mut world.workers[index].inbox) {
                world.give(index, input);
            }
            world.act(index);
        });
    }

    /// Hands an input to a worker, unless it has crashed since `life`.
    pub(super) fn answer(&mut self, index: usize, life: u64, input: Input) {
        if self.workers[index].life == life {
            self.give(index, input);
        }
    }

    pub(super) fn give(&mut self, index: usize, input: Input) {
        let worker = &mut self.workers[index];
        if worker.paused {
            return worker.inbox.push(input);
        }
        if let Some(machine) = &mut worker.machine {
            worker.conduct.hears(&input);
            machine.handle(input, self.now);
            self.act(index);
        }
    }

    fn act(&mut self, index: usize) {
        loop {
            let worker = &mut self.workers[index];
            if worker.paused {
                return;
            }
            let Some(machine) = &mut worker.machine else { return };
            let action = machine.poll(self.now);
            self.judge_content(index);
            let Some(action) = action else { break };
            self.perform(index, action);
        }
        let now = self.now;
        let worker = &mut self.workers[index];
        let Some(machine) = &mut worker.machine else { return };
        for event in machine.take_events() {
            if self.tracing {
                self.trace.push(format!("{now:>10.3?} worker {index} {event:?}"));
            }
        }
        worker.alarm += 1;
        let (alarm, wait) = (worker.alarm, machine.wake_at(now).saturating_sub(now));
        self.after(wait, move |world| {
            if world.workers[index].alarm == alarm {
                world.act(index);
            }
        });
    }

    /// Content stays within the window, a quarter of it and a few messages: a page or a fetch may
    /// bring one that is larger than the room there is.
    fn judge_content(&mut self, index: usize) {
        let Some(machine) = &self.workers[index].machine else { return };
        let held = machine.status(self.now).content_bytes;
        let window = self.plan.settings.bytes_in_flight;
        if held > window + window / 4 + 4 * (LARGE + FRAMING) {
            self.log.violate(format!("content: {held} bytes are held in a window of {window}"));
        }
    }

    fn perform(&mut self, index: usize, action: Action) {
        let life = self.workers[index].life;
        self.note(|| format!("worker {index} {}", summary(&action)));
        let Some(me) = self.workers[index].id else { return };
        let ttl = self.plan.settings.lease;
        match action {
            Action::Keep(order) => self.call(index, life, Input::Kept, move |world| {
                let request = KeepLeases::new(me, ttl).healthy(order.healthy);
                world.database.keep(&request.renew(&order.renew).take(&order.take), world.now)
            }),
            Action::Claim(order) => self.claim(index, life, order),
            Action::Settle(number, order) => {
                if let Some(wrong) = self.workers[index].conduct.settles(number, &order) {
                    self.log.violate(wrong);
                }
                let input = move |result| Input::Settled(number, result);
                self.call(index, life, input, move |world| {
                    let (settled, delivered) = world.database.settle(&order.request(), world.now);
                    for id in delivered {
                        if !world.log.contains(id) {
                            world.log.violate(format!("loss: {id} was deleted before it appeared"));
                        }
                    }
                    settled
                });
            }
            Action::Release(leases, leaving) => {
                self.call(index, life, Input::Released, move |world| {
                    let request = Release::new(me, &leases);
                    let request = if leaving { request.leaving() } else { request };
                    world.database.release(&request, world.now);
                });
            }
            Action::Publish(batch, deliveries) => self.publish(index, life, batch, deliveries),
            Action::Check => {
                let wait = self.millis(0, 20);
                self.after(wait, move |world| {
                    let down = world.is_unreachable(index);
                    let result = if down { Err(PublishErrorKind::Unavailable) } else { Ok(()) };
                    world.answer(index, life, Input::Checked(result));
                });
            }
            Action::Count => {
                self.call(index, life, Input::Counted, |_| Backlog::default());
            }
            Action::Purge(_) => self.call(index, life, Input::Purged, |_| 0),
            Action::Close(within) => {
                let wait = self.millis(0, within.as_millis() as u64);
                self.after(wait, move |world| {
                    // Whatever a shutdown past its limit did not wait for is unknown.
                    for _ in 0..world.workers[index].conduct.unanswered() {
                        world.log.ambiguous();
                    }
                    world.answer(index, life, Input::Closed);
                });
            }
            Action::Stop => {
                self.stop(index);
            }
            _ => unreachable!("no other action exists"),
        }
    }
}

fn summary(action: &Action) -> String {
    match action {
        Action::Publish(batch, all) => {
            let rows: Vec<_> = all.iter().map(|(delivery, _)| delivery.position.0).collect();
            format!("publishes {batch}: {rows:?}")
        }
        other => format!("{other:?}"),
    }
}
