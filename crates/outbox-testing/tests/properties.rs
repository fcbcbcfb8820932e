//! What holds for any input: codecs, names, settings, errors, and the rules of leasing.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::time::Duration;

use outbox_core::delivery::Failure;
use outbox_core::retry::{OnDeath, Retention, RetryPolicy, TopicPolicy};
use outbox_core::store::{KeepLeases, Release, Standing, TakeOver};
use outbox_core::{Dispatcher, Lane, Lease, LeaseTable, Message, MessageId, WorkerId};
use outbox_testing::{MemoryBroker, MemoryStore};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

/// Inputs that failed once are kept beside this file and tried first.
fn config() -> ProptestConfig {
    let file = FileFailurePersistence::Direct("tests/properties.regressions.txt");
    ProptestConfig { failure_persistence: Some(Box::new(file)), ..ProptestConfig::default() }
}

prop_compose! {
    fn any_message()(
        topic in "[a-zA-Z0-9._-]{3,40}",
        id: [u8; 16],
        key in option::of(vec(any::<u8>(), 0..40)),
        payload in option::of(vec(any::<u8>(), 0..200)),
        partition in option::of(0..=i32::MAX),
        headers in vec(("[!-~]{1,20}", option::of(vec(any::<u8>(), 0..40))), 0..6),
    ) -> Message {
        let mut message = Message::builder(topic).id(MessageId::from_bytes(id));
        message = match payload {
            Some(payload) => message.payload(payload),
            None => message.tombstone(),
        };
        if let Some(key) = key {
            message = message.key(key);
        }
        if let Some(partition) = partition {
            message = message.partition(partition);
        }
        for (name, value) in headers.into_iter().filter(|(name, _)| !name.starts_with("outbox-")) {
            message = match value {
                Some(value) => message.header(name, value),
                None => message.null_header(name),
            };
        }
        message.build().expect("nothing of it is forbidden")
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_message_comes_back_from_its_bytes(message in any_message()) {
        prop_assert_eq!(Message::decode(&message.encode()).unwrap(), message);
    }

    #[test]
    fn no_bytes_make_decoding_panic(bytes in vec(any::<u8>(), 0..200)) {
        _ = Message::decode(&bytes);
        _ = LeaseTable::decode(&bytes);
    }

    #[test]
    fn bytes_that_were_cut_or_changed_decode_to_a_valid_message_or_to_none(
        message in any_message(),
        cut in any::<prop::sample::Index>(),
        flip in any::<prop::sample::Index>(),
        with in 1..=u8::MAX,
    ) {
        let whole = message.encode();
        prop_assert!(Message::decode(&whole[..cut.index(whole.len())]).is_err());
        let mut changed = whole.clone();
        changed[flip.index(whole.len())] ^= with;
        if let Ok(other) = Message::decode(&changed) {
            prop_assert_eq!(Message::decode(&other.encode()).unwrap(), other);
        }
    }

    #[test]
    fn topics_are_what_kafka_takes(topic in prop_oneof![".{0,5}", "[a-zA-Z0-9._-]{0,260}"]) {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let expected = (1..=249).contains(&topic.len())
            && topic.chars().all(legal)
            && topic != "."
            && topic != "..";
        prop_assert_eq!(Message::builder(topic).payload("").build().is_ok(), expected);
    }

    #[test]
    fn a_failure_is_one_clean_short_line(text in "\\PC{0,40}|(?s).{0,400}") {
        let shown = Failure::new("destination", &text).to_string();
        prop_assert!(shown.len() <= Failure::MAX_BYTES);
        prop_assert!(shown.starts_with("destination: "));
        prop_assert!(shown.chars().all(|c| !c.is_control()));
        let text = shown.strip_prefix("destination: ").expect("its class");
        let again = Failure::new("destination", text).to_string();
        prop_assert_eq!(again, shown, "what is clean stays as it is");
    }

    #[test]
    fn back_off_stays_between_half_a_step_and_the_cap(
        first in 1_u64..10_000,
        cap in 10_000_u64..10_000_000,
        attempts: u32,
        random in 0.0..1.0_f64,
    ) {
        let (first, cap) = (Duration::from_millis(first), Duration::from_millis(cap));
        let wait = RetryPolicy::exponential(first, cap).delay(attempts, random).unwrap();
        let step = first.saturating_mul(1 << attempts.saturating_sub(1).min(31)).min(cap);
        prop_assert!(wait >= step.mul_f64(0.499) && wait <= step, "{wait:?} of {step:?}");
    }

    #[test]
    fn no_settings_make_build_panic(
        times in prop::array::uniform6(any_time()),
        rows: usize,
        bytes: usize,
        window: usize,
        attempts: u32,
        keeps: bool,
    ) {
        let [lease, shortest, longest, grace, first, cap] = times;
        let retry = RetryPolicy::exponential(first, cap).max_attempts(attempts);
        let retention = if keeps { Retention::Keep(grace) } else { Retention::Delete };
        let built = Dispatcher::builder(MemoryStore::new(), MemoryBroker::new())
            .lease(lease)
            .poll(shortest, longest)
            .grace(grace)
            .drain_limit(cap)
            .rows_in_flight(rows)
            .bytes_in_flight(bytes)
            .in_key_window(window)
            .retention(retention)
            .topic("t", TopicPolicy::new().on_death(OnDeath::Skip))
            .retry(retry)
            .build();
        if rows == 0 || bytes == 0 || window == 0 || shortest > longest || attempts == 0 {
            prop_assert!(built.is_err());
        }
    }

    #[test]
    fn the_lease_table_never_gives_a_live_lane_away(
        steps in vec((0..3_u8, 0..4_u8, 0..3_u64, any::<bool>()), 1..60),
    ) {
        check_leases(&steps)?;
    }

    #[test]
    fn the_memory_store_leases_like_the_table(
        steps in vec((0..3_u8, 0..4_u8, 0..3_u64, any::<bool>()), 1..40),
    ) {
        compare_with_the_store(&steps)?;
    }
}

fn any_time() -> impl Strategy<Value = Duration> {
    prop_oneof![
        Just(Duration::ZERO),
        Just(Duration::MAX),
        (1_u64..100_000).prop_map(Duration::from_millis),
        any::<u64>().prop_map(Duration::from_secs),
    ]
}

const TTL: Duration = Duration::from_secs(4);
const LANES: NonZeroU16 = NonZeroU16::new(3).unwrap();

fn worker(number: u8) -> WorkerId {
    WorkerId::from_bytes([number + 1; 16])
}

/// What a worker would ask for, given how all stood: to renew its own, and to take what it wants.
fn wishes(standing: &Standing, me: WorkerId) -> (Vec<Lease>, Vec<TakeOver>) {
    let (mine, others): (Vec<_>, Vec<_>) =
        standing.lanes.iter().partition(|record| record.owner == Some(me));
    let leases = mine.iter().map(|record| Lease::new(record.lane, record.epoch)).collect();
    (leases, others.into_iter().map(TakeOver::of).collect())
}

/// Random steps: (worker, renew / take / release / from an old standing, seconds that pass).
fn check_leases(steps: &[(u8, u8, u64, bool)]) -> Result<(), TestCaseError> {
    let mut table = LeaseTable::new(LANES);
    let mut now = Duration::from_secs(100);
    let mut last = table.keep(&KeepLeases::new(worker(9), TTL), now);
    // Who was given a lane, and until when: kept by hand, from the requests alone.
    let mut granted: BTreeMap<Lane, (WorkerId, Duration)> = BTreeMap::new();
    for (number, verb, passes, fresh) in steps {
        now += Duration::from_secs(*passes);
        let me = worker(*number);
        if *fresh {
            last = table.keep(&KeepLeases::new(worker(9), TTL), now);
        }
        let (renew, take) = wishes(&last, me);
        let before = table.keep(&KeepLeases::new(worker(9), TTL), now);
        match verb {
            3 => {
                table.release(&Release::new(me, &renew), now);
                for lease in &renew {
                    if !table.is_current(lease) {
                        granted.remove(&lease.lane);
                    }
                }
            }
            _ => {
                let request = KeepLeases::new(me, TTL);
                let request = if *verb == 0 { request.renew(&renew) } else { request.take(&take) };
                let after = table.keep(&request, now);
                for (old, new) in before.lanes.iter().zip(&after.lanes) {
                    prop_assert!(new.epoch >= old.epoch, "epochs only grow");
                    if old.owner == new.owner && old.epoch == new.epoch {
                        if *verb == 0 && new.owner == Some(me) && new.stamp != old.stamp {
                            granted.insert(new.lane, (me, now + TTL));
                        }
                        continue;
                    }
                    prop_assert_eq!(new.owner, Some(me));
                    prop_assert_eq!(new.epoch, old.epoch + 1);
                    let live = granted.get(&new.lane).filter(|(_, until)| *until >= now);
                    prop_assert!(live.is_none(), "{:?} was live: {:?}", new.lane, live);
                    granted.insert(new.lane, (me, now + TTL));
                }
            }
        }
        prop_assert_eq!(LeaseTable::decode(&table.encode()), Some(table.clone()));
    }
    Ok(())
}

/// The same steps on the store that users test with, and on the table.
fn compare_with_the_store(steps: &[(u8, u8, u64, bool)]) -> Result<(), TestCaseError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        use outbox_core::Store;
        let (store, mut table) = (MemoryStore::with_lanes(LANES), LeaseTable::new(LANES));
        // A new store's clock shows a year, so that it can be set back.
        let (began, year) = (tokio::time::Instant::now(), Duration::from_secs(365 * 24 * 3_600));
        let mut last = Standing::default();
        for (number, verb, passes, fresh) in steps {
            tokio::time::advance(Duration::from_secs(*passes)).await;
            let (me, now) = (worker(*number), year + began.elapsed());
            let (renew, take) = wishes(&last, me);
            if *verb == 3 {
                let release = Release::new(me, &renew);
                table.release(&release, now);
                store.release(Release::new(me, &renew)).await.expect("it is in memory");
                continue;
            }
            let request = KeepLeases::new(me, TTL).renew(&renew);
            let request = if *verb == 0 { request } else { request.take(&take) };
            let expected = table.keep(&request, now);
            let found = store.keep_leases(request).await.expect("it is in memory");
            let owners = |standing: &Standing| -> Vec<_> {
                let lanes = standing.lanes.iter();
                lanes.map(|l| (l.lane, l.epoch, l.owner, l.expired, l.ttl)).collect()
            };
            prop_assert_eq!(owners(&found), owners(&expected));
            prop_assert_eq!(found.workers.len(), expected.workers.len());
            if *fresh {
                last = found;
            }
        }
        Ok(())
    })
}
