//! Nanoseconds of a message in the machine alone: `cargo run --release --example machine`.
//!
//! The store answers at once, the broker one batch at a time and only when nothing else is left to
//! do: so its window is always full, as under load.
//!
//! The machine decides everything and does no I/O, so this is what the dispatcher's rules cost
//! (order per key, windows, horizon, settling); its shell, store and broker come on top.

use std::collections::VecDeque;
use std::hint::black_box;
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use outbox_core::broker::Outcome;
use outbox_core::delivery::{Delivery, Lane, Position, Receipt};
use outbox_core::machine::{Action, Input, Machine, Settings};
use outbox_core::store::{Claim, ClaimReply, Claimed, KeepLeases, Settled, StoreProfile};
use outbox_core::{LeaseTable, Message, MessageId};

const ROWS: u64 = 400_000;
const KEYS: u64 = 10_000;
const LANES: NonZeroU16 = NonZeroU16::new(16).expect("16 is not 0");
const ROUNDS: usize = 5;

fn main() {
    let rounds: Vec<f64> = (0..ROUNDS).map(|_| round()).collect();
    // The quickest is the one that others disturbed least.
    let best = rounds.iter().copied().fold(f64::INFINITY, f64::min);
    println!("{best:.0} ns a message (of {ROUNDS} rounds: {rounds:.0?})");
}

/// One backlog from the first claim to the last settle, without the making of its rows.
fn round() -> f64 {
    let mut settings = Settings::default();
    settings.until_empty = true;
    let (worker, lease) = (settings.worker, settings.lease);
    let making = {
        let before = processor_time();
        (1..=ROWS).for_each(|id| drop(black_box(row(id))));
        processor_time() - before
    };
    let before = processor_time();
    let began = Instant::now();
    let mut leases = LeaseTable::new(LANES);
    let mut machine = Machine::new(settings, StoreProfile::new(LANES), Duration::ZERO);
    let mut settled = 0;
    let mut waiting = Vec::new();
    let mut at_broker = VecDeque::new();
    loop {
        for input in waiting.drain(..) {
            machine.handle(input, began.elapsed());
        }
        let action = machine.poll(began.elapsed());
        drop(machine.take_events());
        match action {
            Some(Action::Keep(order)) => {
                let keep = KeepLeases::new(worker, lease).healthy(order.healthy);
                let keep = keep.renew(&order.renew).take(&order.take);
                waiting.push(Input::Kept(Ok(leases.keep(&keep, began.elapsed()))));
            }
            Some(Action::Claim(order)) => waiting.push(Input::Claimed(Ok(reply(order.request())))),
            Some(Action::Publish(batch, deliveries)) => {
                let answers = (0..deliveries.len())
                    .map(|index| (index, Outcome::Delivered(Receipt::default())))
                    .collect();
                at_broker.push_back([Input::Answered(batch, answers), Input::PublishEnded(batch)]);
            }
            Some(Action::Settle(number, order)) => {
                settled += order.request().delivered.len() as u64;
                waiting.push(Input::Settled(number, Ok(Settled::default())));
            }
            Some(Action::Check) => waiting.push(Input::Checked(Ok(()))),
            Some(Action::Close(_)) => waiting.push(Input::Closed),
            Some(Action::Release(..)) => waiting.push(Input::Released(Ok(()))),
            Some(Action::Stop) => break,
            Some(_) => {}
            None => waiting.extend(at_broker.pop_front().into_iter().flatten()),
        }
    }
    assert_eq!(settled, ROWS);
    (processor_time() - before - making) / ROWS as f64
}

/// Nanoseconds that this thread ran, by Linux: what others take is not counted.
fn processor_time() -> f64 {
    let times = std::fs::read_to_string("/proc/thread-self/schedstat").expect("this is Linux");
    times.split(' ').next().and_then(|ran| ran.parse().ok()).expect("it begins with a number")
}

fn reply(claim: Claim<'_>) -> ClaimReply {
    let mut reply = ClaimReply::default();
    if let Some(page) = &claim.page {
        let first = page.after.0 + 1;
        let last = ROWS.min(page.after.0 + page.rows as u64);
        reply.rows.extend((first..=last).map(row));
        reply.covered = Position(last);
        reply.end = last == ROWS;
    }
    reply
}

fn row(id: u64) -> Claimed {
    let key = id * 7_919 % KEYS;
    let mut bytes = [0; 16];
    bytes[8..].copy_from_slice(&id.to_be_bytes());
    let message = Message::builder("orders").id(MessageId::from_bytes(bytes));
    let message = message.key(key.to_string()).payload("{}").build();
    let lane = Lane((key % u64::from(LANES.get())) as u16);
    Delivery::new(Position(id), lane, message.expect("it is valid")).into()
}
