//! How soon after a fault messages are delivered again.

use std::time::Duration;

use super::Befallen;

/// The longest a recovery may take once nothing is broken any more: a lease of six seconds, and a
/// minute for servers that start beside everything else on a small machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(66);

/// From each fault's healing to the next first appearance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Recovery {
    pub(crate) median: Duration,
    pub(crate) longest: Duration,
    /// The faults after which nothing came in time.
    pub(crate) late: Vec<String>,
}

impl Recovery {
    pub(super) fn of(faults: &[Befallen], mut deliveries: Vec<Duration>) -> Self {
        deliveries.sort_unstable();
        let next = |instant: Duration| {
            let later = deliveries.partition_point(|delivery| *delivery < instant);
            deliveries.get(later).copied()
        };
        let mut times = vec![];
        let mut late = vec![];
        for fault in faults {
            let came = next(fault.healed);
            if came.is_none_or(|came| came > calm(faults, fault.healed) + LIMIT) {
                late.push(fault.class.clone());
            }
            times.extend(came.map(|came| came - fault.healed));
        }
        times.sort_unstable();
        let median = times.get(times.len() / 2).copied().unwrap_or_default();
        Self { median, longest: times.last().copied().unwrap_or_default(), late }
    }
}

/// The first moment, not before `instant`, at which no fault is in effect.
fn calm(faults: &[Befallen], mut instant: Duration) -> Duration {
    let last_of = |instant| {
        let going_on = faults.iter().filter(|it| it.began <= instant && instant < it.healed);
        going_on.map(|it| it.healed).max()
    };
    while let Some(later) = last_of(instant) {
        instant = later;
    }
    instant
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn fault(class: &str, began: u64, healed: u64) -> Befallen {
        Befallen { class: class.into(), began: seconds(began), healed: seconds(healed) }
    }

    #[test]
    fn a_recovery_lasts_from_the_healing_to_the_next_delivery() {
        let faults = [fault("a", 1, 2), fault("b", 5, 6), fault("c", 10, 12)];
        let recovery = Recovery::of(&faults, [1, 3, 8, 9, 15].map(seconds).to_vec());
        let expected = Recovery { median: seconds(2), longest: seconds(3), late: vec![] };
        assert_eq!(recovery, expected);
    }

    #[test]
    fn what_comes_too_late_or_never_is_told() {
        let faults = [fault("slow", 1, 2), fault("never", 100, 101)];
        let recovery = Recovery::of(&faults, vec![seconds(2 + 67)]);
        assert_eq!(recovery.late, ["slow", "never"]);
    }

    #[test]
    fn time_in_which_something_else_is_broken_does_not_count() {
        let faults = [fault("a", 1, 2), fault("b", 1, 40), fault("c", 39, 80)];
        let recovery = Recovery::of(&faults, vec![seconds(140)]);
        assert_eq!(
            recovery,
            Recovery { median: seconds(100), longest: seconds(138), late: vec![] }
        );
    }

    #[test]
    fn without_faults_there_is_nothing_to_recover_from() {
        assert_eq!(Recovery::of(&[], vec![]), Recovery::default());
    }
}
