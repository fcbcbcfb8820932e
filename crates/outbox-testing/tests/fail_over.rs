//! Another database server answers while a claim is out.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use outbox_core::broker::Outcome;
use outbox_core::delivery::{Lane, Lease, Receipt};
use outbox_core::machine::{Action, ClaimOrder, Input, Machine, Settings};
use outbox_core::store::{
    Backlog, Claim, ClaimReply, Claimed, KeepLeases, Page, Release, Settled, StoreProfile, TakeOver,
};
use outbox_core::{Delivery, LeaseTable, Message, Position, WorkerId};

/// A machine, and what it works with: a table, a broker that answers when it is told to, and a
/// store that keeps one claim to itself.
struct Scene {
    machine: Machine,
    now: Duration,
    leases: LeaseTable,
    server: u64,
    /// By position; each key is in a lane of its own.
    rows: BTreeMap<u64, (Lane, Message)>,
    kept_back: Option<Arc<ClaimOrder>>,
    /// Batches without an answer, each with the number of its messages.
    at_broker: Vec<(u64, usize)>,
    published: Vec<u64>,
}

const LANES: NonZeroU16 = NonZeroU16::new(2).expect("2 is not 0");

fn settings() -> Settings {
    let mut settings = Settings::default();
    settings.page_rows = 2;
    settings.worker = WorkerId::from_bytes([7; 16]);
    settings
}

impl Scene {
    fn new() -> Self {
        let row = |position| {
            let lane = Lane(u16::from(position < 4));
            let message = Message::builder("orders").key(lane.to_string()).payload("p");
            (position, (lane, message.build().expect("valid")))
        };
        Self {
            machine: Machine::new(settings(), StoreProfile::new(LANES), Duration::ZERO),
            now: Duration::ZERO,
            leases: LeaseTable::new(LANES),
            server: 1,
            rows: (1..=4).map(row).collect(),
            kept_back: None,
            at_broker: Vec::new(),
            published: Vec::new(),
        }
    }

    /// Lets the machine work for so long, as long as the store answers at once.
    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            while let Some(action) = self.machine.poll(self.now) {
                if let Some(input) = self.perform(action) {
                    self.machine.handle(input, self.now);
                }
            }
            self.now = self.machine.wake_at(self.now).min(end);
        }
    }

    fn perform(&mut self, action: Action) -> Option<Input> {
        Some(match action {
            Action::Keep(order) => {
                let Settings { worker, lease, .. } = settings();
                let keep = KeepLeases::new(worker, lease);
                let keep = keep.healthy(order.healthy).renew(&order.renew).take(&order.take);
                let mut standing = self.leases.keep(&keep, self.now);
                standing.server = self.server;
                Input::Kept(Ok(standing))
            }
            Action::Claim(order) => {
                let catches_up = |page: Page<'_>| page.through == Position(4);
                let page = order.request().page.filter(|page| page.after == Position(2));
                if self.server == 1 && page.is_some_and(catches_up) {
                    self.kept_back = Some(order);
                    return None;
                }
                Input::Claimed(Ok(self.reply(order.request())))
            }
            Action::Publish(batch, messages) => {
                self.published.extend(messages.iter().map(|(row, _)| row.position.0));
                self.at_broker.push((batch, messages.len()));
                return None;
            }
            Action::Settle(number, order) => {
                for row in order.request().delivered {
                    self.rows.remove(&row.id.position.0);
                }
                Input::Settled(number, Ok(Settled::default()))
            }
            Action::Check => Input::Checked(Ok(())),
            Action::Count => Input::Counted(Ok(Backlog::default())),
            other => panic!("nobody expects {other:?}"),
        })
    }

    fn reply(&self, claim: Claim<'_>) -> ClaimReply {
        let delivery = |position: &u64| {
            let (lane, message) = self.rows[position].clone();
            Claimed::from(Delivery::new(Position(*position), lane, message))
        };
        let mut reply = ClaimReply::default();
        reply.server = self.server;
        if let Some(page) = claim.page {
            let bounded = page.through < Position(u64::MAX);
            let ours = |lane| page.lanes.contains(lane);
            let found = self.rows.range(page.after.0 + 1..);
            let found = found.filter(|(_, (lane, _))| !bounded || ours(lane)).take(page.rows);
            let found: Vec<_> = found.collect();
            reply.end = found.len() < page.rows;
            reply.covered = found.last().map_or(page.after, |(position, _)| Position(**position));
            for (position, (lane, _)) in found {
                match ours(lane) {
                    true => reply.rows.push(delivery(position)),
                    false => reply.passed.push(Position(*position)),
                }
            }
        }
        let fetched = claim.fetch.iter().filter(|at| self.rows.contains_key(&at.0));
        reply.rows.extend(fetched.map(|at| delivery(&at.0)));
        reply
    }

    fn acknowledge_all(&mut self) {
        for (batch, messages) in std::mem::take(&mut self.at_broker) {
            let delivered = |index| (index, Outcome::Delivered(Receipt::default()));
            let answers = (0..messages).map(delivered).collect();
            self.machine.handle(Input::Answered(batch, answers), self.now);
            self.machine.handle(Input::PublishEnded(batch), self.now);
        }
    }
}

#[test]
fn what_a_claim_asked_for_before_a_fail_over_does_not_overtake_what_is_read_again() {
    let mut scene = Scene::new();
    let other = WorkerId::from_bytes([8; 16]);
    let keep = KeepLeases::new(other, Duration::from_secs(60));
    let free = scene.leases.keep(&keep, scene.now).lanes;
    let taken = scene.leases.keep(&keep.take(&[TakeOver::of(&free[1])]), scene.now).lanes;
    scene.run(Duration::from_secs(1));
    assert_eq!(scene.published, [4], "the other lane is another worker's");

    // That one leaves, and its lane is read from the start.
    let lease = [Lease::new(Lane(1), taken[1].epoch)];
    scene.leases.release(&Release::new(other, &lease).leaving(), scene.now);
    scene.run(settings().keep_every + Duration::from_secs(1));
    assert_eq!(scene.published, [4, 1], "the second row is of the same key");
    let claim = scene.kept_back.take().expect("a claim for what comes after");

    // The keeping of leases learns of the other server, and only then the claim is answered, by it.
    scene.server = 2;
    scene.run(settings().keep_every + Duration::from_secs(1));
    let reply = scene.reply(claim.request());
    assert_eq!(reply.rows.len(), 1, "the third row");
    scene.machine.handle(Input::Claimed(Ok(reply)), scene.now);
    for _ in 0..5 {
        scene.acknowledge_all();
        scene.run(Duration::from_secs(1));
    }
    let of_the_key = scene.published.iter().filter(|position| **position < 4);
    let mut firsts = Vec::new();
    of_the_key.for_each(|position| {
        if !firsts.contains(position) {
            firsts.push(*position);
        }
    });
    assert_eq!(firsts, [1, 2, 3]);
}
