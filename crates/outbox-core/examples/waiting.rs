//! Bytes of memory for a row that waits: `cargo run --release --example waiting [ROWS]`.
//!
//! Rows behind a held one are kept without their content, up to the cap of rows that a worker
//! knows. Here all rows are of one held key; what the process holds more than before is theirs.

use std::num::NonZeroU16;
use std::time::Duration;

use outbox_core::delivery::{Delivery, Lane, Position, RowId, RowState};
use outbox_core::machine::{Action, Input, Machine, Settings};
use outbox_core::store::{Claim, ClaimReply, Claimed, KeepLeases, Settled, StoreProfile, Watched};
use outbox_core::{LeaseTable, Message, MessageId};

const LANES: NonZeroU16 = NonZeroU16::MIN;

/// The cap of a worker; another number may be given.
const ROWS: u64 = 1_000_000;

fn main() {
    let given = std::env::args().nth(1);
    let rows = given.map_or(ROWS, |rows| rows.parse().expect("a number of rows"));
    let before = resident();
    let machine = knowing(rows);
    let held = resident().saturating_sub(before);
    println!("{rows} rows wait: {} MiB, {} bytes a row", held >> 20, held / rows);
    drop(machine);
}

/// A machine that has read so many rows behind a held one.
fn knowing(rows: u64) -> Machine {
    let settings = Settings::default();
    let (worker, lease) = (settings.worker, settings.lease);
    let mut leases = LeaseTable::new(LANES);
    let mut now = Duration::ZERO;
    let mut machine = Machine::new(settings, StoreProfile::new(LANES), now);
    while machine.status(now).known < rows as usize {
        let action = machine.poll(now);
        drop(machine.take_events());
        let input = match action {
            Some(Action::Keep(order)) => {
                let keep = KeepLeases::new(worker, lease).healthy(order.healthy);
                let keep = keep.renew(&order.renew).take(&order.take);
                Input::Kept(Ok(leases.keep(&keep, now)))
            }
            Some(Action::Claim(order)) => Input::Claimed(Ok(reply(&order.request(), rows))),
            Some(Action::Settle(number, _)) => Input::Settled(number, Ok(Settled::default())),
            Some(Action::Check) => Input::Checked(Ok(())),
            Some(_) => continue,
            None => {
                now = machine.wake_at(now);
                continue;
            }
        };
        machine.handle(input, now);
    }
    machine
}

fn reply(claim: &Claim<'_>, rows: u64) -> ClaimReply {
    let mut reply = ClaimReply::default();
    if let Some(page) = &claim.page {
        let (first, last) = (page.after.0 + 1, rows.min(page.after.0 + page.rows as u64));
        reply.rows.extend((first..=last).map(row));
        reply.covered = Position(last);
        reply.end = last == rows;
    }
    let heads = claim.watch.iter().map(|at| Watched::new(RowId::new(*at, id(at.0)), state(at.0)));
    reply.watched.extend(heads);
    reply
}

fn row(at: u64) -> Claimed {
    let message = Message::builder("orders").id(id(at)).key("held").payload("{}").build();
    let delivery = Delivery::new(Position(at), Lane(0), message.expect("it is valid"));
    delivery.with_state(state(at)).into()
}

fn id(at: u64) -> MessageId {
    MessageId::from_bytes(u128::from(at).to_be_bytes())
}

/// The first one is held.
fn state(at: u64) -> RowState {
    RowState::new(u32::from(at == 1), 0).with_held(at == 1)
}

/// What this process holds in memory, by Linux.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("this is Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it says so");
    let kilobytes = line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number");
    kilobytes << 10
}
