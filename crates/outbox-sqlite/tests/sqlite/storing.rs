//! What is particular to the store on SQLite: the file, its one writer, and the byte budget.

use std::time::Duration;

use anyhow::ensure;
use outbox_core::dead_letters::{DeadLetterQuery, DeadLetters};
use outbox_core::delivery::{Failure, Lease, Receipt, Settlement, WorkerId};
use outbox_core::store::{Delivered, Failed, KeepLeases, Purge, Settle, StoreErrorKind, TakeOver};
use tokio::time::Instant;

use super::*;

const TTL: Duration = Duration::from_secs(60);

#[tokio::test]
async fn two_databases_are_two_servers() -> Result<()> {
    let (one, other) = (Lab::new().await?, Lab::new().await?);
    let (first, again) = (one.page().await?.server, one.page().await?.server);
    assert_eq!(first, again);
    assert_ne!(first, other.page().await?.server);
    Ok(())
}

#[tokio::test]
async fn a_claim_neither_waits_for_a_writer_nor_keeps_one_waiting() -> Result<()> {
    let lab = Lab::new().await?;
    lab.add(vec![message("a")]).await?;
    let mut connection = lab.connect().await?;
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    lab.outbox.add(&mut tx, message("b")).await?;
    assert_eq!(lab.page().await?.rows.len(), 1);
    tx.commit().await?;
    assert_eq!(lab.page().await?.rows.len(), 2);
    Ok(())
}

#[tokio::test]
async fn a_write_that_cannot_happen_is_a_conflict_and_can_be_repeated() -> Result<()> {
    let lab = Lab::new().await?;
    lab.add(vec![message("a")]).await?;
    let row = deliveries(lab.page().await?).remove(0);
    let rows = [Delivered::new(id_of(&row), Receipt::default())];
    let mut connection = lab.connect().await?;
    run(&mut connection, "BEGIN IMMEDIATE").await?;
    let keep = KeepLeases::new(WorkerId::generate(), Duration::from_secs(60));
    let settle = Settle::new(&rows, &[]);
    let (kept, settled) = tokio::join!(lab.store.keep_leases(keep), lab.store.settle(settle));
    assert_eq!(kept.expect_err("busy").kind(), StoreErrorKind::Conflict);
    assert_eq!(settled.expect_err("busy").kind(), StoreErrorKind::Conflict);
    run(&mut connection, "COMMIT").await?;
    lab.store.keep_leases(keep).await?;
    lab.store.settle(settle).await?;
    assert_eq!(lab.pending().await?, []);
    Ok(())
}

const ROWS: usize = 3_000;

/// Rows that were delivered and wait to be settled.
async fn acknowledged(lab: &Lab) -> Result<Vec<Delivered>> {
    for _ in 0..ROWS / 100 {
        let big =
            |n: usize| Message::builder("t").key(n.to_string()).payload(vec![7; 4_000]).build();
        lab.add((0..100).map(big).collect::<Result<_, _>>()?).await?;
    }
    let rows = deliveries(lab.page().await?);
    assert_eq!(rows.len(), ROWS);
    Ok(rows.iter().map(|row| Delivered::new(id_of(row), Receipt::default())).collect())
}

/// The application writes all the time, with sqlx's own busy timeout, while the relay deletes and
/// purges as fast as it can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settling_and_purging_fail_no_writer() -> Result<()> {
    let lab = Lab::new().await?;
    let rows = acknowledged(&lab).await?;
    let (store, mut archive) = (lab.store.clone(), lab.connect().await?);
    let archived = "SELECT COUNT(*) FROM outbox_delivered";
    let relay = tokio::spawn(async move {
        let start = Instant::now();
        // SQLite gives no turns: beside a writer without pauses it is the relay that may wait in
        // vain. Then it comes again, as a dispatcher does.
        let settle = Settle::new(&rows, &[]).archive(true);
        while let Err(error) = store.settle(settle).await {
            ensure!(error.kind() == StoreErrorKind::Conflict, error);
        }
        let settled = start.elapsed();
        ensure!(number(&mut archive, archived).await? == ROWS as i64, "not all are archived");
        tokio::time::sleep(Duration::from_millis(20)).await;
        while let Err(error) = store.purge(Purge::new(Duration::ZERO, u32::MAX)).await {
            ensure!(error.kind() == StoreErrorKind::Conflict, error);
        }
        Ok(settled)
    });
    let mut connection = lab.connect().await?;
    let (mut written, mut longest) = (0, Duration::ZERO);
    while !relay.is_finished() || written == 0 {
        let start = Instant::now();
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
        lab.outbox.add(&mut tx, message("live")).await?;
        tx.commit().await?;
        (written, longest) = (written + 1, longest.max(start.elapsed()));
    }
    let settled = relay.await??;
    println!(
        "{ROWS} rows archived in {settled:?}; {written} writes meanwhile, longest {longest:?}"
    );
    assert_eq!(number(&mut connection, archived).await?, 0);
    assert_eq!(lab.pending().await?.len(), written);
    Ok(())
}

/// Looks again and again whether the database can be written to. A stretch in which it cannot is
/// one write of the relay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_of_the_relay_takes_less_than_10_ms() -> Result<()> {
    let lab = Lab::new().await?;
    let rows = acknowledged(&lab).await?;
    let store = lab.store.clone();
    let settling =
        tokio::spawn(async move { store.settle(Settle::new(&rows, &[]).archive(true)).await });
    writers_get_in(&lab, || settling.is_finished()).await?;
    settling.await??;
    let store = lab.store.clone();
    let purging =
        tokio::spawn(async move { store.purge(Purge::new(Duration::ZERO, u32::MAX)).await });
    writers_get_in(&lab, || purging.is_finished()).await?;
    assert_eq!(purging.await??, ROWS as u64);
    Ok(())
}

/// Looks until the end, and fails unless the median of the stretches is short: the machine does
/// other things as well, so that one of them may be longer.
pub(crate) async fn writers_get_in(lab: &Lab, is_over: impl Fn() -> bool) -> Result<()> {
    let impatient = lab.options.clone().busy_timeout(Duration::ZERO);
    let mut connection = SqliteConnection::connect_with(&impatient).await?;
    let (mut stretches, mut busy_since) = (Vec::new(), None);
    while !is_over() {
        match run(&mut connection, "BEGIN IMMEDIATE; ROLLBACK").await {
            Ok(()) => stretches.extend(busy_since.take().map(|since: Instant| since.elapsed())),
            Err(_) => _ = busy_since.get_or_insert_with(Instant::now),
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    stretches.extend(busy_since.map(|since| since.elapsed()));
    stretches.sort_unstable();
    let (count, longest) = (stretches.len(), stretches.last());
    let median = stretches.get(count / 2);
    println!("{count} writes were seen, median {median:?}, longest {longest:?}");
    assert!(median.is_some_and(|median| *median < Duration::from_millis(10)), "{median:?}");
    Ok(())
}

#[tokio::test]
async fn small_rows_do_not_wait_for_a_large_one_before_them() -> Result<()> {
    let lab = Lab::new().await?;
    let large = Message::builder("t").key("large").payload(vec![7; 900_000]).build()?;
    lab.add(vec![large, message("a"), message("b")]).await?;
    let page = Page::new(&[Lane(0)], Position::START, 100);
    let rows = lab.store.claim(Claim::new(100_000).page(page)).await?.rows;
    assert!(
        matches!(rows[..], [Claimed::Unread(_), Claimed::Delivery(_), Claimed::Delivery(_)]),
        "{rows:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_large_row_is_read_when_the_budget_has_room() -> Result<()> {
    let lab = Lab::new().await?;
    let large = || Message::builder("t").key("large").payload(vec![7; 10_000]).build();
    lab.add(vec![message("a"), large()?, large()?]).await?;
    let page = Page::new(&[Lane(0)], Position::START, 1_000);
    let rows = lab.store.claim(Claim::new(24_000).page(page)).await?.rows;
    assert!(
        matches!(rows[..], [Claimed::Delivery(_), Claimed::Delivery(_), Claimed::Unread(_)]),
        "{rows:?}"
    );
    Ok(())
}

/// What is written around the API may be any number: SQLite keeps what it is given.
#[tokio::test]
async fn a_row_with_a_count_beyond_its_range_is_read_and_settled() -> Result<()> {
    let lab = Lab::new().await?;
    lab.add(vec![message("a"), message("b")]).await?;
    let mut connection = lab.connect().await?;
    let counts = "UPDATE outbox SET attempts = 5000000000, revision = 'x' WHERE id = 1";
    run(&mut connection, counts).await?;
    let rows = deliveries(lab.page().await?);
    assert_eq!(rows.len(), 2, "it stops the others");
    let state = rows[0].state;
    assert_eq!((state.attempts, state.revision), (u32::MAX, 0));
    let worker = WorkerId::generate();
    let standing = lab.store.keep_leases(KeepLeases::new(worker, TTL)).await?;
    let take = [TakeOver::of(&standing.lanes[0])];
    let standing = lab.store.keep_leases(KeepLeases::new(worker, TTL).take(&take)).await?;
    let lease = Lease::new(Lane(0), standing.lanes[0].epoch);
    let failure = Failure::new("rejected", "why");
    let held = Failed::new(id_of(&rows[0]), lease, state, u32::MAX, Settlement::Held, failure);
    assert_eq!(lab.store.settle(Settle::new(&[], &[held])).await?.refused, []);
    assert!(deliveries(lab.page().await?)[0].state.held);
    let revised = "UPDATE outbox SET attempts = 5000000000 WHERE id = 1";
    run(&mut connection, revised).await?;
    let listed = lab.store.list(&DeadLetterQuery::new()).await?;
    assert_eq!(listed.len(), 1);
    Ok(())
}

#[tokio::test]
async fn rows_of_no_lane_are_passed() -> Result<()> {
    let lab = Lab::new().await?;
    lab.add(vec![message("a"), message("b")]).await?;
    let all = lab.page().await?;
    let positions: Vec<_> = all.rows.iter().map(Claimed::position).collect();
    for lanes in [&[][..], &[Lane(1)]] {
        let page = Page::new(lanes, Position::START, 100);
        let reply = lab.store.claim(Claim::new(1_000).page(page)).await?;
        assert_eq!((reply.rows.len(), reply.passed), (0, positions.clone()));
        assert_eq!((reply.covered, reply.end), (all.covered, true));
        let bounded = Claim::new(1_000).page(page.through(all.covered)).scan(page);
        let reply = lab.store.claim(bounded).await?;
        assert!(reply.rows.is_empty() && reply.passed.is_empty() && reply.scanned.is_empty());
    }
    Ok(())
}
