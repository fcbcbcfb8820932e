//! A machine with nothing to do sleeps.

use std::num::NonZeroU16;
use std::time::Duration;

use outbox_core::LeaseTable;
use outbox_core::broker::PublishErrorKind;
use outbox_core::machine::{Action, Input, Machine, Settings};
use outbox_core::store::{Backlog, ClaimReply, KeepLeases, StoreProfile};

/// How often a machine wakes in ten minutes in which nothing happens.
fn wakes_in_ten_minutes(broker: Result<(), PublishErrorKind>) -> usize {
    const LANES: NonZeroU16 = NonZeroU16::new(16).unwrap();
    let settings = Settings::default();
    let (worker, ttl) = (settings.worker, settings.lease);
    let mut table = LeaseTable::new(LANES);
    let mut now = Duration::from_secs(1);
    let mut machine = Machine::new(settings, StoreProfile::new(LANES), now);
    let mut wakes = 0;
    while now < Duration::from_secs(601) {
        while let Some(action) = machine.poll(now) {
            machine.handle(
                match action {
                    Action::Keep(order) => {
                        let keep = KeepLeases::new(worker, ttl).healthy(order.healthy);
                        let keep = keep.renew(&order.renew).take(&order.take);
                        Input::Kept(Ok(table.keep(&keep, now)))
                    }
                    Action::Claim(_) => Input::Claimed(Ok(ClaimReply::default())),
                    Action::Check => Input::Checked(broker),
                    Action::Count => Input::Counted(Ok(Backlog::default())),
                    other => panic!("a machine at rest wants {other:?}"),
                },
                now,
            );
        }
        now = machine.wake_at(now);
        wakes += 1;
    }
    wakes
}

#[test]
fn a_machine_at_rest_wakes_a_few_times_a_second() {
    let wakes = wakes_in_ten_minutes(Ok(()));
    assert!(wakes < 600 * 10, "{wakes} times in 600 s");
}

#[test]
fn a_machine_without_a_broker_wakes_a_few_times_a_second() {
    let wakes = wakes_in_ten_minutes(Err(PublishErrorKind::Unavailable));
    assert!(wakes < 600 * 10, "{wakes} times in 600 s");
}
