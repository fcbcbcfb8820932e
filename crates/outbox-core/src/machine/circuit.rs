//! Whether the broker as a whole can be used.

use std::time::Duration;

use super::Time;

const FIRST_PROBE: Duration = Duration::from_millis(250);
const LAST_PROBE: Duration = Duration::from_secs(5);
/// Messages that may be sent after a check that was answered.
const ROOM: usize = 100;

/// Opens when the broker is unavailable, or when something timed out, provided nothing was
/// acknowledged since that message was sent; any acknowledgement closes it, and so does a refusal or a
/// check that passes, once no trouble came for long. Beside traffic, one leaderless partition therefore does not open it.
/// While it is open, single messages probe. None waits for the answer to the one before, which may be
/// for such a partition and never get one.
///
/// Where the broker answers a check all the same, what is down may be a partition, and not the whole:
/// then as many messages may go as [`ROOM`] says, until one of them finds trouble again.
#[derive(Debug, Clone, Default)]
pub(super) struct Circuit {
    open: Option<Open>,
    last_ack: Option<Time>,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    since: Time,
    /// When a message last was in trouble.
    troubled: Time,
    probe_at: Time,
    wait: Duration,
    /// Whether the broker answered a check since it was last in trouble, and how many messages may
    /// still be sent for that.
    answers: bool,
    room: usize,
}

impl Circuit {
    /// Whether single messages alone may go.
    pub(super) fn is_open(&self) -> bool {
        self.open.is_some_and(|open| open.room == 0)
    }

    /// Since when nothing was acknowledged, if the broker was in trouble since.
    pub(super) fn open_since(&self) -> Option<Time> {
        self.open.map(|open| open.since)
    }

    pub(super) fn last_ack(&self) -> Option<Time> {
        self.last_ack
    }

    /// How many messages may be sent now, out of `wanted`.
    pub(super) fn allows(&self, wanted: usize, now: Time) -> usize {
        match self.open {
            None => wanted,
            Some(open) if open.room > 0 => wanted.min(open.room),
            Some(open) if open.probe_at <= now => wanted.min(1),
            Some(_) => 0,
        }
    }

    pub(super) fn probe_at(&self) -> Option<Time> {
        self.open.map(|open| open.probe_at)
    }

    /// So many messages were sent; if the circuit is open, they were probes.
    pub(super) fn sent(&mut self, count: usize, now: Time, random: f64) {
        if let Some(open) = &mut self.open {
            if open.room > 0 {
                open.room = open.room.saturating_sub(count);
                return;
            }
            open.probe_at = now + open.wait.mul_f64(0.5 + 0.5 * random);
            open.wait = (open.wait * 2).min(LAST_PROBE);
        }
    }

    /// A message was acknowledged. Tells since when the circuit was open, if it was.
    pub(super) fn acknowledged(&mut self, now: Time) -> Option<Time> {
        self.last_ack = Some(now);
        self.close()
    }

    /// A message was refused, or a check passed. Either tells little by itself: a client may refuse
    /// messages without the broker, and a broker that takes none may answer checks. But if checks are
    /// answered and no message was in trouble for `long`, in which any that was sent would have been,
    /// it was not the broker. Tells since when the circuit was open, if it was.
    pub(super) fn well_for(&mut self, long: Duration, now: Time) -> Option<Time> {
        let well = |open: Open| open.answers && now.saturating_sub(open.troubled) >= long;
        if self.open.is_some_and(well) { self.close() } else { None }
    }

    /// The broker works. Tells since when the circuit was open, if it was.
    pub(super) fn close(&mut self) -> Option<Time> {
        self.open.take().map(|open| open.since)
    }

    /// The broker answered a check, or did not.
    pub(super) fn checked(&mut self, answers: bool) {
        if let Some(open) = &mut self.open {
            open.answers = answers;
            open.room = if answers { ROOM } else { 0 };
        }
    }

    /// A message was not sent at all: another one may go in its place.
    pub(super) fn spared(&mut self) {
        if let Some(open) = &mut self.open
            && open.answers
        {
            open.room = (open.room + 1).min(ROOM);
        }
    }

    /// A message that was sent at `sent` found the broker unavailable, or timed out. Tells whether
    /// the circuit opened.
    pub(super) fn troubled(&mut self, sent: Time, now: Time, random: f64) -> bool {
        if self.last_ack.is_some_and(|ack| ack >= sent) {
            return false;
        }
        self.checked(false);
        if let Some(open) = &mut self.open {
            open.troubled = now;
            return false;
        }
        let (since, troubled, wait) = (now, now, FIRST_PROBE * 2);
        let probe_at = now + FIRST_PROBE.mul_f64(0.5 + 0.5 * random);
        self.open = Some(Open { since, troubled, probe_at, wait, answers: false, room: 0 });
        true
    }

    /// A probe ended without telling anything about the broker: probe again by then.
    pub(super) fn inconclusive(&mut self, then: Time) {
        if let Some(open) = &mut self.open {
            open.probe_at = open.probe_at.min(then);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Time {
        Duration::from_millis(millis)
    }

    #[test]
    fn trouble_opens_it_unless_something_sent_later_was_acknowledged() {
        let mut circuit = Circuit::default();
        circuit.acknowledged(at(50));
        assert!(!circuit.troubled(at(10), at(100), 0.0));
        assert!(circuit.troubled(at(60), at(100), 0.0));
        assert!(!circuit.troubled(at(60), at(100), 0.0), "it is open already");
        assert_eq!(circuit.allows(100, at(100)), 0);
    }

    #[test]
    fn a_refusal_closes_it_if_checks_are_answered_and_nothing_was_in_trouble_for_long() {
        let (mut circuit, long) = (Circuit::default(), at(20_000));
        circuit.troubled(at(10), at(100), 0.0);
        circuit.troubled(at(20), at(5_000), 0.0);
        assert_eq!(circuit.well_for(long, at(30_000)), None, "no check was answered");
        circuit.checked(true);
        assert_eq!(circuit.well_for(long, at(24_999)), None, "what was sent may be in trouble yet");
        assert_eq!(circuit.well_for(long, at(25_000)), Some(at(100)));
        assert_eq!(circuit.open_since(), None);
    }

    #[test]
    fn single_probes_back_off_until_one_is_acknowledged() {
        let mut circuit = Circuit::default();
        circuit.troubled(at(0), at(0), 1.0);
        assert_eq!(circuit.probe_at(), Some(at(250)));
        assert_eq!(circuit.allows(100, at(250)), 1);
        circuit.sent(1, at(250), 1.0);
        assert_eq!(circuit.allows(100, at(749)), 0);
        assert_eq!(circuit.allows(100, at(750)), 1, "the first probe has no answer yet");
        circuit.sent(1, at(750), 1.0);
        circuit.troubled(at(250), at(800), 1.0);
        assert_eq!(circuit.probe_at(), Some(at(1_750)), "answers do not push a probe away");
        circuit.inconclusive(at(900));
        assert_eq!(circuit.allows(100, at(900)), 1);
        assert_eq!(circuit.acknowledged(at(900)), Some(at(0)));
        assert_eq!(circuit.allows(100, at(900)), 100);
    }

    #[test]
    fn a_broker_that_answers_its_check_gets_some_messages_until_one_finds_trouble() {
        let mut circuit = Circuit::default();
        circuit.checked(true);
        assert!(circuit.troubled(at(0), at(0), 1.0));
        circuit.checked(true);
        assert_eq!((circuit.is_open(), circuit.open_since()), (false, Some(at(0))));
        assert_eq!(circuit.allows(1_000, at(1)), ROOM);
        circuit.sent(ROOM, at(1), 1.0);
        assert_eq!((circuit.is_open(), circuit.allows(1_000, at(1))), (true, 0));
        circuit.spared();
        assert_eq!(circuit.allows(1_000, at(1)), 1);
        circuit.checked(true);
        assert!(!circuit.troubled(at(1), at(2), 1.0), "it is open already");
        circuit.spared();
        assert_eq!(circuit.allows(1_000, at(2)), 0);
        circuit.checked(true);
        circuit.checked(false);
        assert!(circuit.is_open());
    }
}
