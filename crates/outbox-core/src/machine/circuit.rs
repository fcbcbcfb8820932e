//! Whether the broker as a whole can be used.

use std::time::Duration;

use super::Time;

const FIRST_PROBE: Duration = Duration::from_millis(250);
const LAST_PROBE: Duration = Duration::from_secs(5);

/// Opens when the broker is unavailable, or when something timed out, provided nothing was
/// acknowledged since that message was sent; any acknowledgement closes it. Beside traffic, one
/// leaderless partition therefore does not open it. While it is open, single messages probe. None
/// waits for the answer to the one before, which may be for such a partition and never get one.
#[derive(Debug, Clone, Default)]
pub(super) struct Circuit {
    open: Option<Open>,
    last_ack: Option<Time>,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    since: Time,
    probe_at: Time,
    wait: Duration,
}

impl Circuit {
    pub(super) fn is_open(&self) -> bool {
        self.open.is_some()
    }

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
            Some(open) if open.probe_at <= now => wanted.min(1),
            Some(_) => 0,
        }
    }

    pub(super) fn probe_at(&self) -> Option<Time> {
        self.open.map(|open| open.probe_at)
    }

    /// Something was sent; if the circuit is open, it was a probe.
    pub(super) fn sent(&mut self, now: Time, random: f64) {
        if let Some(open) = &mut self.open {
            open.probe_at = now + open.wait.mul_f64(0.5 + 0.5 * random);
            open.wait = (open.wait * 2).min(LAST_PROBE);
        }
    }

    /// A message was acknowledged. Tells whether the circuit was open.
    pub(super) fn acknowledged(&mut self, now: Time) -> bool {
        self.last_ack = Some(now);
        self.open.take().is_some()
    }

    /// A message that was sent at `sent` found the broker unavailable, or timed out. Tells whether
    /// the circuit opened.
    pub(super) fn troubled(&mut self, sent: Time, now: Time, random: f64) -> bool {
        if self.last_ack.is_some_and(|ack| ack >= sent) {
            return false;
        }
        let opened = self.open.is_none();
        if opened {
            let probe_at = now + FIRST_PROBE.mul_f64(0.5 + 0.5 * random);
            self.open = Some(Open { since: now, probe_at, wait: FIRST_PROBE * 2 });
        }
        opened
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
    fn single_probes_back_off_until_one_is_acknowledged() {
        let mut circuit = Circuit::default();
        circuit.troubled(at(0), at(0), 1.0);
        assert_eq!(circuit.probe_at(), Some(at(250)));
        assert_eq!(circuit.allows(100, at(250)), 1);
        circuit.sent(at(250), 1.0);
        assert_eq!(circuit.allows(100, at(749)), 0);
        assert_eq!(circuit.allows(100, at(750)), 1, "the first probe has no answer yet");
        circuit.sent(at(750), 1.0);
        circuit.troubled(at(250), at(800), 1.0);
        assert_eq!(circuit.probe_at(), Some(at(1_750)), "answers do not push a probe away");
        circuit.inconclusive(at(900));
        assert_eq!(circuit.allows(100, at(900)), 1);
        assert!(circuit.acknowledged(at(900)));
        assert_eq!(circuit.allows(100, at(900)), 100);
    }
}
