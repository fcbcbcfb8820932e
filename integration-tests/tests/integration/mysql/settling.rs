//! What becomes of deliveries.

use outbox_core::DeadLetters;
use outbox_core::delivery::{Failure, Receipt, RowState, Settlement};
use outbox_core::store::{Delivered, Failed, Purge, Settle, StoreError};

use super::*;

fn delivered(delivery: &Delivery) -> Delivered {
    Delivered::new(id_of(delivery), Receipt::new(Some(3), Some(77)))
}

fn failed(delivery: &Delivery, lease: Lease, settlement: Settlement) -> Failed {
    let attempts = delivery.state.attempts + 1;
    let failure = Failure::new("failed", "broken 'pipe'");
    Failed::new(id_of(delivery), lease, delivery.state, attempts, settlement, failure)
}

/// The answer of a call that has nothing to wait for. A wait for a lock ends as a conflict.
async fn in_time<T>(call: impl Future<Output = Result<T, StoreError>>) -> Result<T> {
    Ok(tokio::time::timeout(Duration::from_secs(30), call).await.context("it waits")??)
}

on_both! {
    async fn a_delivered_row_goes_and_repeating_is_harmless(lab: Lab) -> Result<()> {
        let row = delivered(&lab.delivery("a").await?);
        lab.delivery("b").await?;
        for _ in 0..2 {
            let settled = lab.store.settle(Settle::new(&[row], &[])).await?;
            assert_eq!(settled.refused, []);
            assert_eq!(lab.pending().await?.len(), 1);
        }
        Ok(())
    }

    async fn a_held_row_that_was_delivered_after_all_is_counted_no_more(lab: Lab) -> Result<()> {
        let row = lab.delivery("a").await?;
        let (_, lease) = lab.take(row.lane).await?;
        lab.store.settle(Settle::new(&[], &[failed(&row, lease, Settlement::Held)])).await?;
        lab.delivery("a").await?;
        let backlog = lab.store.backlog().await?;
        assert_eq!((backlog.held, backlog.pending, backlog.oldest_age), (1, 2, None));
        // By a worker that had lost the lane, and learns late that the message had arrived.
        lab.store.settle(Settle::new(&[delivered(&row)], &[])).await?;
        let backlog = lab.store.backlog().await?;
        assert_eq!((backlog.held, backlog.pending), (0, 1));
        assert!(backlog.oldest_age.is_some(), "its key waits for nobody");
        Ok(())
    }

    async fn a_reused_id_with_another_message_is_not_deleted(lab: Lab) -> Result<()> {
        let delivery = lab.delivery("a").await?;
        let id = RowId::new(delivery.position, outbox_core::MessageId::generate());
        let row = Delivered::new(id, Receipt::default());
        for archive in [false, true] {
            lab.store.settle(Settle::new(&[row], &[]).archive(archive)).await?;
            assert_eq!(lab.pending().await?.len(), 1);
        }
        Ok(())
    }

    async fn thousands_of_rows_are_settled_by_one_call(lab: Lab) -> Result<()> {
        lab.add((0..2500).map(|n| message(&n.to_string())).collect()).await?;
        let all = lanes(4);
        let page = Page::new(&all, Position::START, 5000);
        let rows: Vec<_> = deliveries(lab.store.claim(Claim::new(100 * MEGABYTE).page(page)).await?)
            .iter().map(delivered).collect();
        lab.store.settle(Settle::new(&rows[..2400], &[])).await?;
        assert_eq!(lab.pending().await?.len(), 100);
        Ok(())
    }

    async fn nothing_of_the_relay_or_an_operator_waits_for_a_writer(lab: Lab) -> Result<()> {
        lab.add((0..200).map(|n| message(&n.to_string())).collect()).await?;
        let rows = deliveries(lab.page().await?);
        let worker = WorkerId::generate();
        let standing = lab.store.keep_leases(KeepLeases::new(worker, TTL)).await?;
        let take: Vec<_> = standing.lanes.iter().map(TakeOver::of).collect();
        let standing = lab.store.keep_leases(KeepLeases::new(worker, TTL).take(&take)).await?;
        let lease = |row: &Delivery| {
            Lease::new(row.lane, standing.lanes[usize::from(row.lane.0)].epoch)
        };
        let mut writer = lab.connect().await?;
        let mut open = writer.begin().await?;
        lab.outbox.add(&mut open, message("open")).await?;

        // With a list that is long beside the table servers would rather read the whole table, and
        // so lock or wait for rows that are not listed. Neighbours are not listed.
        let (listed, rest) = rows.split_at(150);
        let (neighbours, rest) = rest.split_at(45);
        let (some, others) = neighbours.split_at(20);
        let every_second = |turn| listed.iter().skip(turn).step_by(2).map(delivered).collect();
        let each = |rows: &[Delivery]| rows.iter().map(delivered).collect();
        let settles: [(Vec<_>, _); 4] = [
            (every_second(0), false),
            (every_second(1), true),
            (each(some), false),
            (each(others), true),
        ];
        for (rows, archive) in settles {
            in_time(lab.store.settle(Settle::new(&rows, &[]).archive(archive))).await?;
        }
        use Settlement::{Dead, Held, Retry};
        let settlements = [Retry(TTL), Dead, Held, Held, Held];
        for (row, settlement) in rest.iter().zip(settlements) {
            let rows = [failed(row, lease(row), settlement)];
            assert_eq!(in_time(lab.store.settle(Settle::new(&[], &rows))).await?.refused, []);
        }
        let held: Vec<_> = rest[2..].iter().map(|row| [row.message.id()]).collect();
        assert_eq!(in_time(lab.store.skip(&held[0])).await?, 1);
        assert_eq!(in_time(lab.store.discard(&held[1])).await?, 1);
        assert_eq!(in_time(lab.store.retry(&held[2])).await?, 1);
        open.commit().await?;
        assert_eq!(lab.pending().await?.len(), 3);
        Ok(())
    }

    async fn a_run_of_rows_is_settled_while_a_writer_is_open_behind_it(lab: Lab) -> Result<()> {
        lab.add((0..20).map(|n| message(&n.to_string())).collect()).await?;
        let rows: Vec<_> = deliveries(lab.page().await?).iter().map(delivered).collect();
        let mut writer = lab.connect().await?;
        let mut open = writer.begin().await?;
        lab.outbox.add(&mut open, message("open")).await?;
        in_time(lab.store.settle(Settle::new(&rows, &[]))).await?;
        // A range of rows that are gone would end at the open one.
        for archive in [false, true] {
            let settle = Settle::new(&rows, &[]).archive(archive).repeated(true);
            assert_eq!(in_time(lab.store.settle(settle)).await?.refused, []);
        }
        open.commit().await?;
        assert_eq!(lab.pending().await?.len(), 1);
        Ok(())
    }

    async fn archived_rows_are_kept_until_they_are_purged(lab: Lab) -> Result<()> {
        let row = delivered(&lab.delivery("a").await?);
        for _ in 0..2 {
            lab.store.settle(Settle::new(&[row], &[]).archive(true)).await?;
        }
        assert_eq!(lab.pending().await?, []);
        let mut connection = lab.connect().await?;
        let kept = "SELECT COUNT(*) FROM outbox_delivered WHERE partition_no = 3 \
                    AND offset_no = 77 AND payload = 'payload'";
        assert_eq!(number(&mut connection, kept).await?, 1);
        let hour = Duration::from_secs(3600);
        assert_eq!(lab.store.purge(Purge::new(hour, 10)).await?, 0);
        run(&mut connection, "UPDATE outbox_delivered SET delivered_at = \
             delivered_at - INTERVAL 2 HOUR").await?;
        assert_eq!(lab.store.purge(Purge::new(hour, 10)).await?, 1);
        assert_eq!(number(&mut connection, kept).await?, 0);
        Ok(())
    }

    async fn a_retry_records_attempts_and_wait(lab: Lab) -> Result<()> {
        let delivery = lab.delivery("a").await?;
        let (_, lease) = lab.take(delivery.lane).await?;
        let wait = Duration::from_secs(60);
        let row = failed(&delivery, lease, Settlement::Retry(wait));
        let settled = lab.store.settle(Settle::new(&[], std::slice::from_ref(&row))).await?;
        assert_eq!(settled.refused, []);
        let watched = lab.store.claim(Claim::new(1).watch(&[delivery.position])).await?.watched;
        assert_eq!(watched[0].id, id_of(&delivery));
        let RowState { attempts, revision, held, wait: left, retried, .. } = watched[0].state;
        assert_eq!((attempts, revision, held, retried), (1, 0, false, false));
        assert!(left > Duration::from_secs(50) && left <= wait, "{left:?}");
        let settled = lab.store.settle(Settle::new(&[], std::slice::from_ref(&row))).await?;
        assert_eq!(settled.refused, [delivery.position]);
        Ok(())
    }

    async fn a_stale_epoch_changes_nothing(lab: Lab) -> Result<()> {
        let delivery = lab.delivery("a").await?;
        let (worker, lease) = lab.take(delivery.lane).await?;
        let before = row_text(&lab).await?;
        let stale = Lease::new(lease.lane, lease.epoch - 1);
        let elsewhere = Lease::new(Lane((lease.lane.0 + 1) % 4), lease.epoch);
        for lease in [stale, elsewhere] {
            for settlement in verbs() {
                let rows = [failed(&delivery, lease, settlement)];
                let settled = lab.store.settle(Settle::new(&[], &rows)).await?;
                assert_eq!(settled.refused, [delivery.position]);
            }
        }
        // A released lane is nobody's.
        let release = outbox_core::store::Release::new(worker, std::slice::from_ref(&lease));
        lab.store.release(release).await?;
        for settlement in verbs() {
            let rows = [failed(&delivery, lease, settlement)];
            let settled = lab.store.settle(Settle::new(&[], &rows)).await?;
            assert_eq!(settled.refused, [delivery.position]);
        }
        assert_eq!(row_text(&lab).await?, before);
        Ok(())
    }

    async fn a_take_over_under_way_makes_the_old_epoch_wait_and_fail(lab: Lab) -> Result<()> {
        let delivery = lab.delivery("a").await?;
        let (_, lease) = lab.take(delivery.lane).await?;
        let before = row_text(&lab).await?;
        for settlement in verbs() {
            let mut other = lab.connect().await?;
            run(&mut other, format!(
                "BEGIN; UPDATE outbox_lane SET epoch = epoch + 1 WHERE lane = {}", lease.lane
            )).await?;
            let mut connection = lab.connect().await?;
            let epoch = number(&mut connection, &format!(
                "SELECT CAST(epoch AS SIGNED) FROM outbox_lane WHERE lane = {}", lease.lane
            )).await?;
            let lease = Lease::new(lease.lane, epoch.try_into()?);
            let rows = [failed(&delivery, lease, settlement)];
            let store = lab.store.clone();
            let settle = tokio::spawn(async move {
                store.settle(Settle::new(&[], &rows)).await
            });
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert!(!settle.is_finished(), "it must wait for the other's decision");
            run(&mut other, "COMMIT").await?;
            assert_eq!(settle.await??.refused, [delivery.position]);
        }
        assert_eq!(row_text(&lab).await?, before);
        Ok(())
    }

    async fn an_older_revision_changes_nothing(lab: Lab) -> Result<()> {
        let delivery = lab.delivery("a").await?;
        let (_, lease) = lab.take(delivery.lane).await?;
        run(&mut lab.connect().await?, "UPDATE outbox SET revision = revision + 1").await?;
        let before = row_text(&lab).await?;
        for settlement in verbs() {
            let rows = [failed(&delivery, lease, settlement)];
            let settled = lab.store.settle(Settle::new(&[], &rows)).await?;
            assert_eq!(settled.refused, [delivery.position]);
        }
        assert_eq!(row_text(&lab).await?, before);
        Ok(())
    }
}

fn verbs() -> [Settlement; 3] {
    [Settlement::Retry(Duration::from_secs(1)), Settlement::Held, Settlement::Dead]
}

/// All that a verb could change.
async fn row_text(lab: &Lab) -> Result<String> {
    let sql = "SELECT CONCAT_WS('|', attempts, available_at IS NULL, held_at IS NULL, \
               last_error IS NULL, (SELECT COUNT(*) FROM outbox_held), \
               (SELECT COUNT(*) FROM outbox_dead)) FROM outbox";
    Ok(sqlx::query_scalar(sql).fetch_one(&mut lab.connect().await?).await?)
}

on_both! {
    async fn failures_are_recorded_beside_others_and_beside_renewals(lab: Lab) -> Result<()> {
        lab.add((0..400).map(|n| message(&n.to_string())).collect()).await?;
        let rows = deliveries(lab.page().await?);
        let (worker, leases) = lab.take_all().await?;
        let request = KeepLeases::new(worker, TTL * 10);
        let failures: Vec<_> = rows
            .iter()
            .enumerate()
            .map(|(n, row)| {
                let settlement = match n % 3 {
                    0 => Settlement::Retry(TTL),
                    1 => Settlement::Held,
                    _ => Settlement::Dead,
                };
                failed(row, leases[usize::from(row.lane.0)], settlement)
            })
            .collect();
        let renewals = async {
            for _ in 0..100 {
                lab.store.keep_leases(request.renew(&leases)).await?;
            }
            Ok(())
        };
        let (one, two) = failures.split_at(200);
        let store = &lab.store;
        let settle = |some| async move {
            let settled = store.settle(Settle::new(&[], some)).await?;
            anyhow::ensure!(settled.refused.is_empty(), "refused");
            Ok(())
        };
        tokio::try_join!(settle(one), settle(two), renewals)?;
        Ok(())
    }

    async fn purges_of_the_archive_side_by_side_do_not_fail(lab: Lab) -> Result<()> {
        let mut root = lab.connect().await?;
        run(&mut root, "INSERT INTO outbox_delivered (outbox_id, message_id, topic, created_at, \
               attempts, delivered_at) \
             WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 900) \
             SELECT i, UNHEX(REPLACE(UUID(), '-', '')), 't', UTC_TIMESTAMP(6), 1, \
               UTC_TIMESTAMP(6) - INTERVAL 1 HOUR FROM n").await?;
        let purge = || async {
            let mut purged = 0;
            loop {
                let some = lab.store.purge(Purge::new(Duration::from_secs(60), 100)).await?;
                purged += some;
                if some == 0 {
                    return anyhow::Ok(purged);
                }
            }
        };
        let (one, two, three) = tokio::try_join!(purge(), purge(), purge())?;
        assert_eq!(one + two + three, 900);
        Ok(())
    }
}
