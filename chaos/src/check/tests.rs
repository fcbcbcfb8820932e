//! The checker, fed with histories that contain each violation.

use super::*;

const BESIDE: u32 = crate::entry::ORDERED;
const CREATED: u64 = 1_000;

fn attempt(number: u8, aggregate: u32, sequence: u64, outcome: Outcome) -> Attempt {
    let id = MessageId::from_bytes([number; 16]);
    Attempt { id, entry: Entry { aggregate, sequence }, began: 2_000, outcome }
}

fn appearance(of: &Attempt, millis: u64) -> Appearance {
    let at = Duration::from_millis(millis);
    Appearance { id: of.id, partition: 0, entry: Some(of.entry), at }
}

/// Two messages of aggregate 1 and one of aggregate 2, two beside them; one failed, one unknown that
/// was committed and one that was not; and one fault.
fn good() -> Run {
    let (ok, unknown) = (Outcome::Ok, Outcome::Unknown);
    let written = [
        attempt(1, 1, 1, ok),
        attempt(2, 1, 2, unknown),
        attempt(3, 2, 1, ok),
        attempt(4, BESIDE, 1, ok),
        attempt(5, BESIDE, 2, ok),
    ];
    let mut attempts = written.to_vec();
    attempts.extend([attempt(6, 2, 2, Outcome::Failed), attempt(7, 2, 2, unknown)]);
    let millis = [100, 200, 3_000, 100, 200];
    let appearances: Vec<_> =
        written.iter().zip(millis).map(|(it, millis)| appearance(it, millis)).collect();
    Run {
        attempts,
        committed: written.iter().map(|it| (it.id, it.entry)).collect(),
        appearances: appearances[..3].to_vec(),
        beside: appearances[3..].to_vec(),
        beside_created: CREATED,
        faults: vec![Befallen {
            class: "trouble".into(),
            began: Duration::from_secs(1),
            healed: Duration::from_secs(2),
        }],
        excuses: Excuses { window: 1, faults: 1, leases_lost: 0, ambiguous: 1 },
        ..Run::default()
    }
}

/// The one violation of a run that was spoilt.
fn violation(spoil: impl FnOnce(&mut Run)) -> String {
    let mut run = good();
    spoil(&mut run);
    let violations = judge(&run).violations();
    assert_eq!(violations.len(), 1, "{violations:?}");
    violations.concat()
}

#[test]
fn a_good_run_has_no_violation_and_its_figures_are_counted() {
    let findings = judge(&good());
    assert_eq!(findings.violations(), [""; 0]);
    let expected = Findings {
        committed: 5,
        judged: 5,
        ok: 4,
        failed: 1,
        unknown: 2,
        unknown_committed: 1,
        records: 5,
        excused: 2,
        recovery: Recovery {
            median: Duration::from_secs(1),
            longest: Duration::from_secs(1),
            late: vec![],
        },
        ..Findings::default()
    };
    assert_eq!(findings, expected);
}

#[test]
fn a_loss_is_found() {
    let found = violation(|run| _ = run.appearances.remove(0));
    assert_eq!(found, "1 messages committed and never appeared");
    // Its writer does not know that it was committed.
    let found = violation(|run| _ = run.appearances.remove(1));
    assert_eq!(found, "1 messages committed and never appeared");
}

#[test]
fn a_ghost_is_found_whether_its_commit_failed_or_is_unknown() {
    for number in [5, 6] {
        let found = violation(|run| {
            let ghost = appearance(&run.attempts[number], 4_000);
            run.appearances.push(ghost);
        });
        assert_eq!(found, "1 messages appeared and were not committed");
    }
}

#[test]
fn content_that_is_mangled_of_another_or_on_another_topic_is_a_ghost() {
    let mangled =
        |run: &mut Run| run.appearances.push(Appearance { entry: None, ..run.appearances[0] });
    let swapped = |run: &mut Run| {
        let entry = run.appearances[0].entry;
        run.appearances.push(Appearance { entry, ..run.appearances[2] });
    };
    let astray = |run: &mut Run| run.appearances.push(run.beside[0]);
    for spoil in [mangled, swapped, astray] {
        assert_eq!(violation(spoil), "1 messages appeared and were not committed");
    }
}

#[test]
fn a_disorder_is_found_even_if_the_older_one_then_comes_again() {
    let told = "1 messages appeared first after a later one of their key";
    assert_eq!(violation(|run| run.appearances.swap(0, 1)), told);
    let again = |run: &mut Run| {
        run.appearances.swap(0, 1);
        run.appearances.push(run.appearances[0]);
    };
    assert_eq!(violation(again), told);
    assert_eq!(violation(|run| run.appearances[1].partition = 1), told);
}

#[test]
fn repetitions_are_counted_and_too_many_of_them_are_found() {
    let repeat = |times: usize| {
        let mut run = good();
        run.appearances.extend(vec![run.appearances[0]; times]);
        judge(&run)
    };
    assert_eq!(repeat(2).duplicates, 2);
    assert_eq!(repeat(2).violations(), [""; 0]);
    assert_eq!(repeat(3).violations(), ["1 messages repeated beyond the bound"]);
}

#[test]
fn the_bound_is_the_window_for_each_fault_and_lost_lease_and_one_for_each_unclear_answer() {
    let excuses = Excuses { window: 100, faults: 3, leases_lost: 2, ambiguous: 7 };
    assert_eq!(excuses.total(), 507);
}

#[test]
fn a_database_that_forgot_a_commit_or_invented_one_is_found() {
    let found = violation(|run| {
        run.committed.remove(&run.attempts[0].id);
        run.appearances.remove(0);
    });
    assert_eq!(found, "1 messages confirmed by the database and not in its table");
    for outcome in [Some(Outcome::Failed), None] {
        let found = violation(|run| {
            let invented = attempt(9, 2, 2, Outcome::Failed);
            run.committed.insert(invented.id, invented.entry);
            run.appearances.push(appearance(&invented, 4_000));
            run.attempts.extend(outcome.map(|outcome| Attempt { outcome, ..invented }));
        });
        assert_eq!(found, "1 messages in the table though nobody sent their COMMIT");
    }
}

#[test]
fn a_run_that_never_recovers_is_found() {
    let found = violation(|run| run.faults[0].healed = Duration::from_secs(4));
    assert_eq!(found, "nothing was delivered within 66 s of the end of: trouble");
}

#[test]
fn what_stays_in_the_outbox_is_blamed_or_falls_is_found() {
    assert_eq!(violation(|run| run.left = 2), "2 messages still in the outbox");
    assert_eq!(violation(|run| run.blamed = 3), "3 messages held, dead or with an attempt counted");
    assert_eq!(violation(|run| run.fell = 1), "1 processes ended by themselves");
}

#[test]
fn a_run_in_which_nothing_was_written_shows_nothing() {
    let violations = judge(&Run::default()).violations();
    assert_eq!(violations, ["nothing was committed: the run shows nothing"]);
}

#[test]
fn beside_the_ordered_topic_what_is_younger_than_the_topic_is_judged_as_any_other() {
    let lost = violation(|run| _ = run.beside.remove(0));
    assert_eq!(lost, "1 messages committed and never appeared");
    let disordered = violation(|run| run.beside.swap(0, 1));
    assert_eq!(disordered, "1 messages appeared first after a later one of their key");
}

#[test]
fn beside_the_ordered_topic_what_is_older_than_the_topic_must_only_be_no_ghost() {
    let old = |run: &mut Run| {
        for attempt in &mut run.attempts {
            attempt.began = CREATED - 1;
        }
    };
    for spoil in [|run: &mut Run| run.beside.clear(), |run: &mut Run| run.beside.swap(0, 1)] {
        let mut run = good();
        old(&mut run);
        spoil(&mut run);
        assert_eq!(judge(&run).violations(), [""; 0]);
    }
    let found = violation(|run| {
        old(run);
        let ghost = attempt(9, BESIDE, 3, Outcome::Failed);
        run.beside.push(appearance(&ghost, 300));
    });
    assert_eq!(found, "1 messages appeared and were not committed");
}
