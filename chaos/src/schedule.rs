//! Which faults come when: decided by the seed alone, before anything runs.

use std::{collections::BTreeMap, time::Duration};

use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::fault::{Cast, Client, Fault, Hold, Kind, Link, Part};

/// Everybody works before the first fault.
const BEFORE: Duration = Duration::from_secs(3);
/// No fault begins this late: what it did can then be seen while writers still write.
const AFTER: Duration = Duration::from_secs(8);

/// The faults of a run of that length, about one in every `every`, in order of their instants.
///
/// A longer run of the same seed begins with the same faults.
pub(crate) fn schedule(
    seed: u64,
    length: Duration,
    every: Duration,
    cast: Cast,
) -> Vec<(Duration, Fault)> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut deck = Deck::default();
    let mut busy = BTreeMap::new();
    let mut faults = vec![];
    let mut at = BEFORE;
    while at + AFTER <= length {
        if let Some(fault) =
            deck.draw(&mut rng, cast, |hold| busy.get(&hold).is_none_or(|until| *until <= at))
        {
            for hold in fault.kind.holds(cast) {
                busy.insert(hold, at + fault.lasts + rest(hold));
            }
            faults.push((at, fault));
        }
        at += every.mul_f64(rng.random_range(0.25..1.75));
    }
    faults
}

/// How long a part needs after a fault before the next one can show anything.
fn rest(hold: Hold) -> Duration {
    match hold {
        Hold::Process(Part::Database) => Duration::from_secs(5),
        // A broker reads its log again, and its copies must catch up before another may go.
        Hold::Brokers => Duration::from_secs(20),
        _ => Duration::from_secs(1),
    }
}

/// Cards that are shuffled, drawn, and shuffled again when all are gone: every kind comes, soon and
/// about as often as it is in the deck.
#[derive(Debug, Default)]
struct Deck(Vec<Card>);

impl Deck {
    /// The next card that strikes nobody who is busy; `None` if there is none.
    fn draw(
        &mut self,
        rng: &mut StdRng,
        cast: Cast,
        is_free: impl Fn(Hold) -> bool,
    ) -> Option<Fault> {
        if self.0.is_empty() {
            self.0 = CARDS.iter().flat_map(|(count, card)| vec![*card; *count]).collect();
            self.0.shuffle(rng);
        }
        for index in (0..self.0.len()).rev() {
            let fault = self.0[index].fault(rng, cast);
            if fault.kind.holds(cast).into_iter().all(&is_free) {
                self.0.remove(index);
                return Some(fault);
            }
        }
        None
    }
}

/// A kind of trouble, whose victim is drawn when it comes.
#[derive(Debug, Clone, Copy)]
enum Card {
    Kill(Role),
    Terminate(Role),
    Stop(Role),
    SlowStart(Role),
    Cut(Way),
    Delay(Way),
    BlackHole(Way),
    Refuse(Way),
    CommitReplyLost,
    CommitLost,
    SettleReplyLost,
    ConnectionsKilled(Client),
    ReadOnly,
    TopicDeleted,
}

#[derive(Debug, Clone, Copy)]
enum Role {
    Writer,
    Relay,
    Database,
    Broker,
}

#[derive(Debug, Clone, Copy)]
enum Way {
    Writers,
    Relay,
    Broker,
}

/// How often each card is in the deck: more of what is over soon, fewer outages of everything.
const CARDS: &[(usize, Card)] = &[
    (3, Card::Kill(Role::Relay)),
    (2, Card::Terminate(Role::Relay)),
    (3, Card::Stop(Role::Relay)),
    (2, Card::Kill(Role::Writer)),
    (1, Card::Terminate(Role::Writer)),
    (2, Card::Stop(Role::Writer)),
    (1, Card::Kill(Role::Database)),
    (1, Card::Terminate(Role::Database)),
    (1, Card::Stop(Role::Database)),
    (1, Card::SlowStart(Role::Database)),
    (1, Card::Kill(Role::Broker)),
    (1, Card::Terminate(Role::Broker)),
    (1, Card::Stop(Role::Broker)),
    (1, Card::SlowStart(Role::Broker)),
    (1, Card::Cut(Way::Writers)),
    (2, Card::Cut(Way::Relay)),
    (2, Card::Cut(Way::Broker)),
    (1, Card::Delay(Way::Writers)),
    (2, Card::Delay(Way::Relay)),
    (2, Card::Delay(Way::Broker)),
    (1, Card::BlackHole(Way::Writers)),
    (2, Card::BlackHole(Way::Relay)),
    (2, Card::BlackHole(Way::Broker)),
    (1, Card::Refuse(Way::Relay)),
    (1, Card::Refuse(Way::Broker)),
    (3, Card::CommitReplyLost),
    (2, Card::CommitLost),
    (3, Card::SettleReplyLost),
    (1, Card::ConnectionsKilled(Client::Writers)),
    (2, Card::ConnectionsKilled(Client::Relays)),
    (1, Card::ReadOnly),
    (1, Card::TopicDeleted),
];

impl Card {
    fn fault(self, rng: &mut StdRng, cast: Cast) -> Fault {
        let (kind, (least, most)) = match self {
            Self::Kill(role) => (Kind::Kill(role.part(rng, cast)), (0.1, 2.0)),
            Self::Terminate(role) => (Kind::Terminate(role.part(rng, cast)), (0.1, 2.0)),
            // A relay's lease is six seconds: some stop for longer.
            Self::Stop(Role::Relay) => (Kind::Stop(Role::Relay.part(rng, cast)), (0.5, 9.0)),
            Self::Stop(role) => (Kind::Stop(role.part(rng, cast)), (0.5, 5.0)),
            Self::SlowStart(role) => (Kind::SlowStart(role.part(rng, cast)), (1.0, 4.0)),
            Self::Cut(way) => (Kind::Cut(way.link(rng, cast)), (0.0, 0.1)),
            Self::Delay(way) => (Kind::Delay(way.link(rng, cast)), (1.0, 5.0)),
            Self::BlackHole(way) => (Kind::BlackHole(way.link(rng, cast)), (0.5, 7.0)),
            Self::Refuse(way) => (Kind::Refuse(way.link(rng, cast)), (0.5, 7.0)),
            Self::CommitReplyLost => (Kind::CommitReplyLost, (2.0, 4.0)),
            Self::CommitLost => (Kind::CommitLost, (2.0, 4.0)),
            Self::SettleReplyLost => {
                (Kind::SettleReplyLost(rng.random_range(0..cast.relays)), (2.0, 4.0))
            }
            Self::ConnectionsKilled(client) => (Kind::ConnectionsKilled(client), (0.0, 0.1)),
            Self::ReadOnly => (Kind::ReadOnly, (0.5, 4.0)),
            Self::TopicDeleted => (Kind::TopicDeleted, (0.5, 5.0)),
        };
        let millis = rng.random_range(least..most) * 1_000.0;
        Fault { kind, lasts: Duration::from_millis(millis as u64) }
    }
}

impl Role {
    fn part(self, rng: &mut StdRng, cast: Cast) -> Part {
        match self {
            Self::Writer => Part::Writer(rng.random_range(0..cast.writers)),
            Self::Relay => Part::Relay(rng.random_range(0..cast.relays)),
            Self::Database => Part::Database,
            Self::Broker => Part::Broker(rng.random_range(0..cast.brokers)),
        }
    }
}

impl Way {
    fn link(self, rng: &mut StdRng, cast: Cast) -> Link {
        match self {
            Self::Writers => Link::Writers,
            Self::Relay => Link::Relay(rng.random_range(0..cast.relays)),
            Self::Broker => Link::Broker(rng.random_range(0..cast.brokers)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const CAST: Cast = Cast { writers: 4, relays: 2, brokers: 3 };
    const EVERY: Duration = Duration::from_secs(4);
    const LONG: Duration = Duration::from_secs(40 * 60);

    fn faults(seed: u64, length: Duration) -> Vec<(Duration, Fault)> {
        schedule(seed, length, EVERY, CAST)
    }

    #[test]
    fn the_seed_decides_every_fault() {
        assert_eq!(faults(7, LONG), faults(7, LONG));
        assert_ne!(faults(7, LONG), faults(8, LONG));
    }

    #[test]
    fn a_longer_run_begins_with_the_same_faults() {
        let (short, long) = (faults(7, Duration::from_secs(60)), faults(7, LONG));
        assert!(short.len() > 5, "{short:?}");
        assert_eq!(short[..], long[..short.len()]);
    }

    #[test]
    fn faults_come_in_order_and_leave_time_before_and_after() {
        for seed in 0..20 {
            let faults = faults(seed, LONG);
            assert!(faults.is_sorted_by_key(|(at, _)| *at));
            assert!(faults.iter().all(|(at, _)| *at >= BEFORE && *at + AFTER <= LONG));
        }
    }

    #[test]
    fn forty_minutes_have_more_than_five_hundred_faults() {
        for seed in 0..20 {
            let count = faults(seed, LONG).len();
            assert!(count > 500, "seed {seed}: {count}");
        }
    }

    #[test]
    fn every_kind_strikes_every_part_in_forty_minutes() {
        for seed in 0..20 {
            let faults = faults(seed, LONG);
            let kinds: BTreeSet<_> = faults.iter().map(|(_, fault)| fault.kind).collect();
            let classes: BTreeSet<_> = kinds.iter().map(|kind| kind.class()).collect();
            assert_eq!(classes.len(), CARDS.len(), "seed {seed}");
            for relay in 0..CAST.relays {
                assert!(kinds.contains(&Kind::Kill(Part::Relay(relay))), "seed {seed}");
            }
        }
    }

    #[test]
    fn no_two_faults_have_the_same_part_at_once() {
        for seed in 0..20 {
            let mut busy: BTreeMap<Hold, Duration> = BTreeMap::new();
            for (at, fault) in schedule(seed, LONG, Duration::from_secs(1), CAST) {
                for hold in fault.kind.holds(CAST) {
                    let until = busy.insert(hold, at + fault.lasts).unwrap_or_default();
                    assert!(until <= at, "seed {seed}: {hold:?} at {at:?}");
                }
            }
        }
    }

    #[test]
    fn a_class_leaves_the_number_of_its_part_out() {
        assert_eq!(Kind::Kill(Part::Relay(1)).class(), "SIGKILL: relay");
        assert_eq!(Kind::Cut(Link::Broker(12)).class(), "connections cut: relays and broker");
        assert_eq!(Kind::ReadOnly.class(), "read-only: database");
    }
}
