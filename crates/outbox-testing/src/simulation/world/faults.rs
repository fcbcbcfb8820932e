//! Faults, planned when the run begins, and the operator who looks after what is held.

use std::time::Duration;

use outbox_core::machine::Input;
use rand::Rng;

use super::World;

impl World {
    pub(super) fn plan_faults(&mut self) {
        let workers = self.workers.len();
        for _ in 0..self.plan.crashes {
            let (at, worker) = (self.within_storm(), self.random.random_range(0..workers));
            self.after(at, move |world| world.crash(worker));
        }
        for _ in 0..self.plan.pauses {
            let (at, worker) = (self.within_storm(), self.random.random_range(0..workers));
            self.after(at, move |world| world.pause(worker));
        }
        for _ in 0..self.plan.restarts {
            let (at, worker) = (self.within_storm(), self.random.random_range(0..workers));
            self.after(at, move |world| world.give(worker, Input::ShutDown));
        }
        for _ in 0..self.plan.outages {
            let (at, long) = (self.within_storm(), self.millis(100, 20_000));
            self.after(at, move |world| {
                world.note(|| format!("broker down for {long:?}"));
                world.fault();
                world.broker_down += 1;
                world.after(long, |world| world.broker_down -= 1);
            });
        }
        if self.plan.cut_off {
            // For good: the others must deliver everything.
            let (at, worker) = (self.within_storm(), self.random.random_range(0..workers));
            self.after(at, move |world| {
                world.note(|| format!("worker {worker} is cut off from the broker"));
                world.fault();
                world.workers[worker].cut = true;
            });
        }
        for _ in 0..self.plan.store_outages {
            let (at, long) = (self.within_storm(), self.millis(100, 15_000));
            self.after(at, move |world| {
                world.note(|| format!("store down for {long:?}"));
                world.fault();
                world.store_down += 1;
                world.after(long, |world| world.store_down -= 1);
            });
        }
        for _ in 0..self.plan.clock_steps {
            let (at, step) = (self.within_storm(), self.random.random_range(-3_600..3_600_i64));
            self.after(at, move |world| world.step_clock(step));
        }
        for _ in 0..self.plan.server_changes {
            let at = self.within_storm();
            self.after(at, move |world| {
                world.note(|| "another server answers".into());
                world.fault();
                world.database.server += 1;
            });
        }
    }

    fn step_clock(&mut self, step: i64) {
        self.note(|| format!("the store's clock steps by {step} s"));
        self.fault();
        let clock = self.database.clock.as_secs() as i64 + step;
        self.database.clock = Duration::from_secs(clock.max(0) as u64);
    }

    pub(super) fn operate(&mut self) {
        for id in self.database.held() {
            let retry = self.random.random_ratio(2, 3);
            self.note(|| format!("operator {} row {id}", if retry { "retries" } else { "skips" }));
            if retry {
                if let Some(row) = self.database.rows.get(&id) {
                    self.rejected.remove(&row.message.id());
                }
                self.database.retry(id);
            } else {
                self.database.skip(id);
            }
        }
        self.after(Duration::from_secs(5), Self::operate);
    }
}
