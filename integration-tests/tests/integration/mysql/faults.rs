//! Calls that are dropped, answers that are lost, locks of others, another server.

use std::net::SocketAddr;
use std::time::Instant;

use anyhow::ensure;
use integration_tests::proxy::{Direction, Proxy};
use outbox_core::Dispatcher;
use outbox_core::delivery::{Failure, Receipt, Settlement, Span};
use outbox_core::store::{Delivered, Failed, Settle, StoreErrorKind};
use outbox_testing::MemoryBroker;

use super::traffic::until_empty;
use super::*;

/// Long for what waits for nothing, on a machine that does other things as well; short against the
/// minute for which the server keeps a silent connection.
const SOON: Duration = Duration::from_secs(15);

/// A proxy before the lab's server, and a store of its own that connects through it.
async fn through_a_proxy(lab: &Lab) -> Result<(Proxy, MySqlStore)> {
    let server = servers::database_of(lab.engine).await.context("it is there: the lab uses it")?;
    let address = tokio::net::lookup_host(server.address()).await?.next().context("address")?;
    let proxy = Proxy::start(address, 1).await?;
    let store = MySqlStore::connect(&proxy.url(&lab.url), &lab.schema).await?;
    Ok((proxy, store))
}

/// Another server with the same tables in a database of the same name, to which an address may move.
async fn elsewhere(lab: &Lab) -> Result<Option<(SocketAddr, MySqlConnection)>> {
    let other = match lab.engine {
        Engine::MariaDb => Engine::MySql,
        Engine::MySql => Engine::MariaDb,
    };
    let Some(other) = servers::database_of(other).await else { return Ok(None) };
    let name = lab.url.rsplit_once('/').context("a database in the URL")?.1;
    let mut connection = MySqlConnection::connect(&other.url()).await?;
    run(&mut connection, format!("CREATE DATABASE {name}; USE {name}")).await?;
    lab.schema.migrate(&mut connection).await?;
    let address = tokio::net::lookup_host(other.address()).await?.next().context("address")?;
    Ok(Some((address, connection)))
}

fn failed(row: &Delivery, lease: Lease, settlement: Settlement) -> Failed {
    let failure = Failure::new("failed", "why");
    Failed::new(id_of(row), lease, row.state, row.state.attempts + 1, settlement, failure)
}

fn delivered(row: &Delivery) -> Delivered {
    Delivered::new(id_of(row), Receipt::default())
}

/// Fails if a transaction stays open in the lab's database, however little it did.
async fn nothing_is_open(lab: &Lab) -> Result<()> {
    let sql = "SELECT COUNT(*) FROM information_schema.innodb_trx t \
               JOIN information_schema.processlist p ON p.id = t.trx_mysql_thread_id \
               WHERE p.db = DATABASE()";
    let mut connection = lab.connect().await?;
    let start = Instant::now();
    loop {
        // The server renews what it shows of transactions only after it was not asked for 100 ms.
        tokio::time::sleep(Duration::from_millis(200)).await;
        match number(&mut connection, sql).await {
            Ok(0) => return Ok(()),
            Ok(open) => ensure!(start.elapsed() < SOON, "{open} transactions are open"),
            // MySQL fails to show statements with bytes that are no text, while one runs.
            Err(error) => ensure!(start.elapsed() < SOON, "{error:#}"),
        }
    }
}

/// Fails if anybody keeps a lock of a row of ours, or of the table.
async fn nothing_is_locked(lab: &Lab) -> Result<()> {
    let start = Instant::now();
    loop {
        match lock_everything(lab).await {
            Ok(()) => return Ok(()),
            Err(error) if start.elapsed() > SOON => return Err(error),
            // What reached the server before the worker vanished may still be at work.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn lock_everything(lab: &Lab) -> Result<()> {
    let mut connection = lab.connect().await?;
    for table in ["outbox", "outbox_lane", "outbox_worker", "outbox_held", "outbox_dead"] {
        run(&mut connection, format!("BEGIN; SELECT * FROM {table} FOR UPDATE NOWAIT; ROLLBACK"))
            .await?;
    }
    // Writers would queue behind this statement if it had to wait.
    run(&mut connection, "SET lock_wait_timeout = 2; ALTER TABLE outbox COMMENT 'unlocked'").await
}

on_both! {
    async fn a_dropped_call_leaves_no_transaction_and_no_slot_of_its_line(lab: Lab) -> Result<()> {
        let row = lab.delivery("a").await?;
        let (_, lease) = lab.take(row.lane).await?;
        let (proxy, store) = through_a_proxy(&lab).await?;
        let all = lanes(4);
        let page = Claim::new(MEGABYTE).page(Page::new(&all, Position::START, 10));
        let retry = [failed(&row, lease, Settlement::Retry(Duration::ZERO))];
        let settle = Settle::new(&[], &retry);
        // More often than any line has connections.
        for _ in 0..6 {
            assert_eq!(store.claim(page).await?.rows.len(), 1);
            store.settle(Settle::new(&[], &[])).await?;
            proxy.swallow(Direction::ToClient);
            let hung = Duration::from_millis(100);
            tokio::time::timeout(hung, store.claim(page)).await.expect_err("it is swallowed");
            tokio::time::timeout(hung, store.settle(settle)).await.expect_err("it is swallowed");
            tokio::time::timeout(hung, store.backlog()).await.expect_err("it is swallowed");
            proxy.heal();
        }
        nothing_is_open(&lab).await?;
        assert_eq!(store.backlog().await?.pending, 1);
        Ok(())
    }

    async fn a_worker_that_vanishes_within_a_call_blocks_nobody(lab: Lab) -> Result<()> {
        for direction in [Direction::ToClient, Direction::ToServer] {
            for settlement in [Settlement::Retry(TTL), Settlement::Held, Settlement::Dead] {
                let row = lab.delivery("a").await?;
                let (worker, lease) = lab.take(row.lane).await?;
                let (proxy, store) = through_a_proxy(&lab).await?;
                store.settle(Settle::new(&[delivered(&row)], &[])).await?;
                let row = lab.delivery("a").await?;
                let rows = [failed(&row, lease, settlement)];
                store.keep_leases(KeepLeases::new(worker, TTL)).await?;
                proxy.swallow(direction);
                let other = lab.delivery("b").await?;
                let (archived, renew) = ([delivered(&other)], [lease]);
                let calls = async {
                    tokio::join!(
                        store.settle(Settle::new(&[], &rows)),
                        store.settle(Settle::new(&archived, &[]).archive(true)),
                        store.keep_leases(KeepLeases::new(worker, TTL).renew(&renew)),
                    )
                };
                // The calls go on: nobody has noticed yet that the worker is gone.
                let mut calls = std::pin::pin!(calls);
                tokio::time::timeout(Duration::from_millis(300), &mut calls)
                    .await
                    .expect_err("it is swallowed");
                nothing_is_locked(&lab).await?;
                lab.store.release(outbox_core::store::Release::new(worker, &renew)).await?;
                let left = deliveries(lab.page().await?);
                let left: Vec<_> = left.iter().map(delivered).collect();
                lab.store.settle(Settle::new(&left, &[])).await?;
            }
        }
        Ok(())
    }

    async fn a_row_that_somebody_locks_is_a_conflict_and_nothing_stays_open(lab: Lab) -> Result<()> {
        let row = lab.delivery("a").await?;
        let (_, lease) = lab.take(row.lane).await?;
        let mut other = lab.connect().await?;
        run(&mut other, "BEGIN; SELECT id FROM outbox FOR UPDATE").await?;
        let rows = [failed(&row, lease, Settlement::Held)];
        // 1205, after the relay's own short wait and not the server's 50 s.
        let settled = tokio::time::timeout(Duration::from_secs(30), async {
            lab.store.settle(Settle::new(&[], &rows)).await
        });
        let error = settled.await?.expect_err("the row is locked");
        assert_eq!(error.kind(), StoreErrorKind::Conflict);
        run(&mut other, "ROLLBACK").await?;
        nothing_is_open(&lab).await?;
        assert_eq!(lab.store.settle(Settle::new(&[], &rows)).await?.refused, []);
        Ok(())
    }

    async fn a_deadlock_is_a_conflict_and_changes_nothing(lab: Lab) -> Result<()> {
        let row = lab.delivery("a").await?;
        let (_, lease) = lab.take(row.lane).await?;
        let mut other = lab.connect().await?;
        // The victim is the lighter transaction: the other one gets some weight.
        let weight: Vec<_> = (1..200).map(|n| format!("({n})")).collect();
        run(&mut other, "CREATE TABLE w (id INT PRIMARY KEY)").await?;
        run(&mut other, format!("BEGIN; INSERT INTO w VALUES {}", weight.join(","))).await?;
        let id = row.position;
        run(&mut other, format!(
            "INSERT INTO outbox_held (outbox_id, message_id, topic, held_at) \
             VALUES ({id}, x'00112233445566778899aabbccddeeff', 't', UTC_TIMESTAMP())"
        )).await?;
        let rows = [failed(&row, lease, Settlement::Held)];
        let (store, held) = (lab.store.clone(), rows.clone());
        let settle = tokio::spawn(async move { store.settle(Settle::new(&[], &held)).await });
        // It has locked the row and waits for the list of held ones.
        let mut looking = lab.connect().await?;
        let mut free = async || run(&mut looking, "SELECT id FROM outbox FOR UPDATE NOWAIT").await.is_ok();
        while !settle.is_finished() && free().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        run(&mut other, format!("SELECT id FROM outbox WHERE id = {id} FOR UPDATE")).await?;
        let error = settle.await?.expect_err("it was the victim");
        assert_eq!(error.kind(), StoreErrorKind::Conflict);
        run(&mut other, "ROLLBACK").await?;
        nothing_is_open(&lab).await?;
        assert_eq!(deliveries(lab.page().await?)[0].state, row.state);
        assert_eq!(lab.store.settle(Settle::new(&[], &rows)).await?.refused, []);
        Ok(())
    }

    async fn another_server_is_told_apart_and_its_smaller_ids_are_delivered(lab: Lab) -> Result<()> {
        let Some((address, mut connection)) = elsewhere(&lab).await? else { return Ok(()) };
        let (proxy, store) = through_a_proxy(&lab).await?;
        let first = store.claim(Claim::new(1)).await?.server;
        let standing = store.keep_leases(KeepLeases::new(WorkerId::generate(), TTL)).await?;
        assert_eq!(standing.server, first);
        let broker = MemoryBroker::new();
        let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).lease(TTL).build()?;
        let running = tokio::spawn(dispatcher.run(std::future::pending()));
        lab.add((0..50).map(|n| message(&n.to_string())).collect()).await?;
        broker.wait_for(50).await;

        proxy.dial(address);
        proxy.cut();
        // Ids begin at 1 again there.
        let mut tx = connection.begin().await?;
        lab.outbox.add_all(&mut tx, (0..3).map(|n| message(&n.to_string()))).await?;
        tx.commit().await?;
        broker.wait_for(53).await;
        // The first try of either line is on its connection to the former server, which is cut.
        let second = loop {
            if let Ok(reply) = store.claim(Claim::new(1)).await {
                break reply.server;
            }
        };
        let keep = KeepLeases::new(WorkerId::generate(), TTL);
        let standing = loop {
            if let Ok(standing) = store.keep_leases(keep).await {
                break standing;
            }
        };
        assert_ne!(second, first);
        assert_eq!(standing.server, second);
        running.abort();
        Ok(())
    }

    /// As a restore does, or somebody between two tests.
    async fn a_table_that_is_emptied_beside_a_relay_is_read_from_the_start(lab: Lab) -> Result<()> {
        let broker = MemoryBroker::new();
        let dispatcher = Dispatcher::builder(lab.store.clone(), broker.clone()).lease(TTL).build()?;
        let running = tokio::spawn(dispatcher.run(std::future::pending()));
        lab.delivers(50, &broker).await?;
        until_empty(&lab).await?;
        run(&mut lab.connect().await?, "TRUNCATE TABLE outbox").await?;
        lab.delivers(10, &broker).await?;
        // Some of them below what was read before, and some above.
        lab.delivers(60, &broker).await?;
        running.abort();
        Ok(())
    }

    async fn every_line_follows_an_address_that_moved_though_connections_to_the_old_server_live(
        lab: Lab
    ) -> Result<()> {
        let Some((address, _)) = elsewhere(&lab).await? else { return Ok(()) };
        let (proxy, store) = through_a_proxy(&lab).await?;
        let first = store.claim(Claim::new(1)).await?.server;
        proxy.dial(address);
        // The first keep needs a connection, which is one to the other server.
        let standing = store.keep_leases(KeepLeases::new(WorkerId::generate(), TTL)).await?;
        assert_ne!(standing.server, first);
        assert_eq!(store.claim(Claim::new(1)).await?.server, standing.server);
        Ok(())
    }

    async fn a_locked_table_is_not_waited_for_for_longer_than_a_locked_row(lab: Lab) -> Result<()> {
        let lanes = lanes(4);
        let claim = || lab.store.claim(Claim::new(1).page(Page::new(&lanes, Position::START, 1)));
        claim().await?;
        let mut operator = lab.connect().await?;
        run(&mut operator, "LOCK TABLES outbox WRITE").await?;
        let start = Instant::now();
        let error = claim().await.expect_err("the table is locked");
        assert_eq!(error.kind(), StoreErrorKind::Conflict);
        assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
        run(&mut operator, "UNLOCK TABLES").await?;
        claim().await?;
        Ok(())
    }

    async fn spans_that_end_before_they_begin_or_at_the_last_id_are_no_error(lab: Lab) -> Result<()> {
        lab.add(vec![message("a")]).await?;
        let spans = [Span::new(Position(0), Position(u64::MAX)), Span::new(Position(9), Position(3))];
        let reply = lab.store.claim(Claim::new(1).sweep(&spans).open(&spans)).await?;
        assert_eq!((reply.swept.len(), reply.open.len()), (1, 1));
        Ok(())
    }
}
