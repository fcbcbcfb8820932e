//! Calls to the store: how long they take, and whether request and answer arrive.

use std::sync::Arc;
use std::time::Duration;

use outbox_core::machine::{ClaimOrder, Input};
use outbox_core::store::StoreErrorKind;
use rand::Rng;

use super::World;

impl World {
    /// How a call to the store goes: when it takes effect, if it does, and when the answer comes,
    /// if it does before the deadline.
    fn fate(&mut self) -> (Option<Duration>, Option<Duration>) {
        let deadline = self.plan.settings.statement_deadline;
        let there = self.latency();
        let back = there + self.latency();
        if self.store_down > 0 {
            self.fault();
            return (None, None);
        }
        if !self.chance(self.plan.store_faults) {
            return (Some(there), (back < deadline).then_some(back));
        }
        self.fault();
        let late = self.millis(0, 2_000);
        match self.random.random_range(0..4) {
            0 => (None, None),
            1 => (Some(there), None),
            2 => (Some(late), (late + there < deadline).then_some(late + there)),
            _ => (Some(there), (late < deadline).then_some(late.max(there))),
        }
    }

    pub(super) fn latency(&mut self) -> Duration {
        let slow = self.random.random_ratio(1, 30);
        Duration::from_micros(self.random.random_range(20..=if slow { 20_000 } else { 800 }))
    }

    pub(super) fn call<T: 'static>(
        &mut self,
        index: usize,
        life: u64,
        input: impl Fn(Result<T, StoreErrorKind>) -> Input + 'static,
        effect: impl FnOnce(&mut Self) -> T + 'static,
    ) {
        let (effect_at, answer_at) = self.fate();
        let deadline = self.plan.settings.statement_deadline;
        let Some(answer_at) = answer_at else {
            // The deadline passes, or the connection breaks before it; the effect may come later.
            let broken = if self.random.random_bool(0.5) { deadline } else { deadline / 20 };
            if let Some(at) = effect_at {
                self.after(at, move |world| {
                    effect(world);
                });
            }
            return self.after(broken, move |world| {
                world.answer(index, life, input(Err(StoreErrorKind::Unavailable)));
            });
        };
        let back = answer_at.saturating_sub(effect_at.unwrap_or_default());
        self.after(effect_at.unwrap_or_default(), move |world| {
            let value = effect(world);
            world.after(back, move |world| world.answer(index, life, input(Ok(value))));
        });
    }

    /// A claim has four snapshots, each later than the one before: the page's, those of the two
    /// halves of the sweep, the second with what is read by position, and the scan's.
    pub(super) fn claim(&mut self, index: usize, life: u64, order: Arc<ClaimOrder>) {
        let (effect_at, answer_at) = self.fate();
        let deadline = self.plan.settings.statement_deadline;
        let (Some(at), Some(answer_at)) = (effect_at, answer_at) else {
            return self.after(deadline, move |world| {
                world.answer(index, life, Input::Claimed(Err(StoreErrorKind::Unavailable)));
            });
        };
        let slow = self.plan.slow_reads && self.random.random_ratio(1, 4);
        let longer = if slow { self.millis(5, 400) } else { Duration::ZERO };
        let odd_first = self.random.random();
        let between = (answer_at + longer).saturating_sub(at) / 4;
        self.after(at, move |world| {
            let mut reply = world.database.page(&order.request(), world.now);
            world.after(between, move |world| {
                world.database.sweep(&order.request(), odd_first, &mut reply);
                world.after(between, move |world| {
                    world.database.sweep(&order.request(), !odd_first, &mut reply);
                    world.database.rest(&order.request(), &mut reply, world.now);
                    world.after(between, move |world| {
                        world.database.scan(&order.request(), &mut reply);
                        world.after(between, move |world| {
                            world.answer(index, life, Input::Claimed(Ok(reply)));
                        });
                    });
                });
            });
        });
    }
}
