//! What statements read: rows of their lists and limits, never the whole table.
//!
//! The servers count every row that is read or written. The counters are those of a whole server, so
//! that each test has one of its own.

use integration_tests::database::{Database, Options, PrivateDatabase};
use integration_tests::servers::Backend;
use outbox_core::DeadLetters;
use outbox_core::dead_letters::{DeadLetterQuery, Place};
use outbox_core::delivery::{Failure, Receipt, Settlement, Span};
use outbox_core::store::{Backlog, Delivered, Failed, Purge, Release, Settle};
use outbox_mysql::MySqlInbox;

use super::*;

/// Far more rows than any statement may read.
const ROWS: u64 = 12_000;

/// The rows of a list, and of a limit.
const LIST: usize = 300;

/// A row is read to be found, to be checked, and to be changed; joined rows are read as well.
const READS_PER_ROW: u64 = 6;

/// Leases, workers, versions: all that is read besides.
const BESIDES: u64 = 400;

struct Counted {
    lab: Lab,
    counters: MySqlConnection,
    _server: PrivateDatabase,
}

impl Counted {
    async fn new(engine: Engine) -> Result<Option<Self>> {
        if Backend::Database(engine).is_left_out() {
            return Ok(None);
        }
        let server = Database::private(engine, Options::fast()).await?;
        let lab = Lab::at(&server, MySqlSchema::new().with_lanes(4)?).await?;
        let mut tx = lab.connect().await?;
        let mut tx = tx.begin().await?;
        lab.outbox.add_all(&mut tx, (0..ROWS).map(|n| message(&n.to_string()))).await?;
        tx.commit().await?;
        let counters = lab.connect().await?;
        Ok(Some(Self { lab, counters, _server: server }))
    }

    async fn reads(&mut self) -> Result<u64> {
        // What a statement notes down for itself is written before it is read.
        let sql = "SHOW GLOBAL STATUS \
                   WHERE Variable_name LIKE 'Handler_read%' OR Variable_name = 'Handler_write'";
        let rows: Vec<(String, String)> = sqlx::query_as(sql).fetch_all(&mut self.counters).await?;
        rows.iter().map(|(_, count)| Ok(count.parse::<u64>()?)).sum()
    }

    /// Checks how many rows a call read.
    async fn bounded(
        &mut self,
        what: &str,
        rows: u64,
        call: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        // Reading the counters reads rows, on either server about as many each time.
        let (first, before) = (self.reads().await?, self.reads().await?);
        call.await.with_context(|| what.to_owned())?;
        let read = (self.reads().await? - before).saturating_sub(before - first);
        let bound = rows * READS_PER_ROW + BESIDES;
        assert!(bound < ROWS, "the bound shows nothing");
        assert!(read <= bound, "{what}: {read} rows were read for {rows} ({})", self.lab.engine);
        Ok(())
    }
}

/// Every part of a claim; gives rows that were fetched.
async fn claims_are_bounded(counted: &mut Counted) -> Result<Vec<Delivery>> {
    let store = counted.lab.store.clone();
    let all = lanes(4);
    let list = LIST as u64;
    let every_other: Vec<_> = (0..list).map(|n| Position(ROWS / 2 + n * 2)).collect();
    let narrow: Vec<_> = every_other.iter().map(|at| Span::new(*at, *at)).collect();
    let wide: Vec<_> = (0..20)
        .map(|n| Span::new(Position(1_000 + n * 400), Position(1_000 + n * 400 + 39)))
        .collect();
    let spans = [narrow, wide].concat();
    let swept = Claim::new(MEGABYTE).sweep(&spans);
    counted
        .bounded("sweep", list + 800, async {
            assert_eq!(store.claim(swept).await?.swept.len(), LIST + 800);
            Ok(())
        })
        .await?;
    counted
        .bounded("open", list + 800, async {
            assert_eq!(store.claim(Claim::new(1).open(&spans)).await?.open.len(), LIST + 800);
            Ok(())
        })
        .await?;
    counted
        .bounded("watch", list, async {
            assert_eq!(store.claim(Claim::new(1).watch(&every_other)).await?.watched.len(), LIST);
            Ok(())
        })
        .await?;
    let mut rows = Vec::new();
    counted
        .bounded("fetch", list, async {
            rows = deliveries(store.claim(Claim::new(MEGABYTE).fetch(&every_other)).await?);
            assert_eq!(rows.len(), LIST);
            Ok(())
        })
        .await?;
    let own = &all[..1];
    let page = Page::new(own, Position(ROWS / 2), LIST);
    counted
        .bounded("page", list, async {
            let reply = store.claim(Claim::new(MEGABYTE).page(page)).await?;
            assert_eq!(reply.rows.len() + reply.passed.len(), LIST);
            Ok(())
        })
        .await?;
    counted
        .bounded("page of all lanes", list, async {
            let page = Page::new(&all, Position(ROWS / 2), LIST);
            let reply = store.claim(Claim::new(MEGABYTE).page(page)).await?;
            assert_eq!(reply.rows.len(), LIST);
            Ok(())
        })
        .await?;
    counted
        .bounded("newest", 1, async {
            let newest = store.claim(Claim::new(1).newest(Some(Position(1)))).await?.newest;
            assert!(newest.is_some_and(|newest| newest.0 >= ROWS));
            let above = Some(Position(10 * ROWS));
            assert_eq!(store.claim(Claim::new(1).newest(above)).await?.newest, None);
            Ok(())
        })
        .await?;
    counted
        .bounded("bounded page", list, async {
            let page = page.through(Position(ROWS / 2 + list));
            store.claim(Claim::new(MEGABYTE).page(page)).await?;
            Ok(())
        })
        .await?;
    counted
        .bounded("scan", list, async {
            let page = Page::new(&all, Position(ROWS / 2), LIST);
            assert_eq!(store.claim(Claim::new(1).scan(page)).await?.scanned.len(), LIST);
            Ok(())
        })
        .await?;
    Ok(rows)
}

async fn every_list_is_read_by_primary_key(engine: Engine) -> Result<()> {
    let Some(mut counted) = Counted::new(engine).await? else { return Ok(()) };
    let store = counted.lab.store.clone();
    let rows = claims_are_bounded(&mut counted).await?;

    let (worker, leases) = counted.lab.take_all().await?;
    let request = KeepLeases::new(worker, TTL * 10);
    let (archived, rest) = rows.split_at(LIST / 3);
    let (failed, deleted) = rest.split_at(LIST / 3);
    let delivered = |rows: &[Delivery]| -> Vec<_> {
        rows.iter().map(|row| Delivered::new(id_of(row), Receipt::default())).collect()
    };
    let failed: Vec<_> = failed
        .iter()
        .enumerate()
        .map(|(n, row)| {
            let settlement = match n % 3 {
                0 => Settlement::Retry(TTL),
                1 => Settlement::Held,
                _ => Settlement::Dead,
            };
            let lease = leases[usize::from(row.lane.0)];
            Failed::new(id_of(row), lease, row.state, 1, settlement, Failure::new("failed", "why"))
        })
        .collect();
    let third = LIST as u64 / 3;
    let (deleted, archived) = (delivered(deleted), delivered(archived));
    counted
        .bounded("delete", third, async {
            store.settle(Settle::new(&deleted, &[])).await?;
            Ok(())
        })
        .await?;
    counted
        .bounded("archive", third, async {
            store.settle(Settle::new(&archived, &[]).archive(true)).await?;
            Ok(())
        })
        .await?;
    counted
        .bounded("failures", third, async {
            assert_eq!(store.settle(Settle::new(&[], &failed)).await?.refused, []);
            Ok(())
        })
        .await?;
    counted
        .bounded("purge", third, async {
            store.purge(Purge::new(Duration::ZERO, 100)).await?;
            Ok(())
        })
        .await?;
    let mut letters = Vec::new();
    counted
        .bounded("dead letters", third, async {
            letters = store.list(&DeadLetterQuery::new()).await?;
            assert!(letters.len() > LIST / 6);
            Ok(())
        })
        .await?;
    counted
        .bounded("verbs", third, async {
            let ids: Vec<_> = letters.iter().map(|letter| letter.id).collect();
            assert_eq!(store.retry(&ids).await?, ids.len() as u64);
            Ok(())
        })
        .await?;
    counted
        .bounded("leases", 4, async {
            store.keep_leases(request.renew(&leases)).await?;
            Ok(store.release(Release::new(worker, &leases)).await?)
        })
        .await?;

    let left = number(&mut counted.lab.connect().await?, "SELECT COUNT(*) FROM outbox").await?;
    let in_table = u64::try_from(left)?;
    let expected = ROWS
        - 2 * third
        - failed.iter().filter(|f| f.settlement == Settlement::Dead).count() as u64
        + letters
            .iter()
            .filter(|l| l.cursor.place == outbox_core::dead_letters::Place::Dead)
            .count() as u64;
    assert_eq!(in_table, expected, "more or fewer rows were settled");
    Ok(())
}

/// Makes the server take these tables for empty, for good. Its picture of a table is an old one: that
/// of the outbox of a relay that keeps up shows hardly a row when a backlog comes.
async fn take_for_empty(lab: &Lab, tables: &[&str]) -> Result<()> {
    let mut connection = lab.connect().await?;
    for table in tables {
        let picture = format!(
            "ALTER TABLE {table} STATS_AUTO_RECALC = 0; \
             UPDATE mysql.innodb_table_stats SET n_rows = 0, clustered_index_size = 1 \
             WHERE database_name = DATABASE() AND table_name = '{table}'; FLUSH TABLE {table}"
        );
        run(&mut connection, picture).await?;
    }
    Ok(())
}

async fn a_row_is_archived_by_its_receipt_in_a_table_that_is_taken_for_empty(
    engine: Engine,
) -> Result<()> {
    let Some(mut counted) = Counted::new(engine).await? else { return Ok(()) };
    let store = counted.lab.store.clone();
    let kilobyte = |_| Message::builder("t").payload(vec![b'p'; 1024]).build();
    run(&mut counted.lab.connect().await?, "TRUNCATE TABLE outbox").await?;
    counted.lab.add((0..ROWS / 4).map(kilobyte).collect::<Result<_, _>>()?).await?;
    take_for_empty(&counted.lab, &["outbox"]).await?;
    let all = lanes(4);
    let page = Page::new(&all, Position::START, LIST);
    let rows = deliveries(store.claim(Claim::new(MEGABYTE).page(page)).await?);
    let delivered: Vec<_> =
        rows.iter().map(|row| Delivered::new(id_of(row), Receipt::default())).collect();
    assert_eq!(delivered.len(), LIST);
    counted
        .bounded("archive", LIST as u64, async {
            store.settle(Settle::new(&delivered, &[]).archive(true)).await?;
            Ok(())
        })
        .await?;
    let archived = "SELECT COUNT(*) FROM outbox_delivered";
    assert_eq!(number(&mut counted.lab.connect().await?, archived).await?, LIST as i64);
    Ok(())
}

/// All tables are large, and the server takes each of them for empty, alone and all together.
async fn statements_do_not_go_by_what_the_server_thinks_of_a_table(engine: Engine) -> Result<()> {
    let tables = ["outbox", "outbox_held", "outbox_dead", "outbox_delivered", "outbox_inbox"];
    for taken in tables.iter().map(std::slice::from_ref).chain([&tables[..]]) {
        let Some(mut counted) = Counted::new(engine).await? else { return Ok(()) };
        let store = counted.lab.store.clone();
        let filled = "INSERT INTO outbox_dead (outbox_id, message_id, topic, message_key, payload, \
               created_at, attempts, revision, retried, died_at) \
             SELECT id + 1000000, message_id, topic, message_key, payload, created_at, 1, 0, FALSE, \
               UTC_TIMESTAMP(6) FROM outbox; \
             INSERT INTO outbox_delivered (outbox_id, message_id, topic, message_key, payload, \
               created_at, attempts, delivered_at) \
             SELECT id + 1000000, message_id, topic, message_key, payload, created_at, 1, \
               UTC_TIMESTAMP(6) FROM outbox; \
             UPDATE outbox SET held_at = UTC_TIMESTAMP(6) WHERE id > 2000; \
             INSERT INTO outbox_held (outbox_id, message_id, topic, message_key, held_at) \
             SELECT id, message_id, topic, message_key, held_at FROM outbox WHERE id > 2000; \
             INSERT INTO outbox_inbox (consumer, message_id, accepted_at) \
             SELECT 'mail', message_id, UTC_TIMESTAMP(6) - INTERVAL IF(id > 11950, 2, 0) HOUR \
             FROM outbox";
        run(&mut counted.lab.connect().await?, filled).await?;
        let before = counted.reads().await?;
        let backlog = store.backlog().await?;
        let cost = counted.reads().await? - before;
        assert_eq!((backlog.held, backlog.dead), (ROWS - 2_000, ROWS));
        take_for_empty(&counted.lab, taken).await?;
        let what = |what: &str| format!("{what}, {taken:?} taken for empty");

        let rows = claims_are_bounded(&mut counted).await.with_context(|| what("claims"))?;
        let delivered: Vec<_> =
            rows.iter().map(|row| Delivered::new(id_of(row), Receipt::default())).collect();
        for (archive, some) in [false, true].into_iter().zip(delivered.chunks(LIST / 2)) {
            counted
                .bounded(&what("settle"), LIST as u64 / 2, async {
                    store.settle(Settle::new(some, &[]).archive(archive)).await?;
                    Ok(())
                })
                .await?;
        }
        let before = counted.reads().await?;
        assert_eq!(store.backlog().await?.held, backlog.held - LIST as u64);
        let now = counted.reads().await? - before;
        assert!(now <= cost + cost / 4 + BESIDES, "{}: {now} rows, {cost} before", what("backlog"));
        let mut letters = Vec::new();
        for place in [Place::Held, Place::Dead] {
            counted
                .bounded(&what("list"), 100, async {
                    let query = DeadLetterQuery::new().place(place).limit(100);
                    letters.push(store.list(&query).await?);
                    Ok(())
                })
                .await?;
        }
        let ids = |place: usize, from: usize| -> Vec<_> {
            letters[place][from..from + 30].iter().map(|letter| letter.id).collect()
        };
        let (held, dead) = (ids(0, 0), ids(1, 0));
        counted
            .bounded(&what("retry"), 150, async {
                store.retry(&held).await?;
                store.retry(&dead).await?;
                Ok(())
            })
            .await?;
        let (skipped, discarded) = (ids(0, 30), ids(0, 60));
        counted
            .bounded(&what("skip and discard"), 150, async {
                store.skip(&skipped).await?;
                store.discard(&discarded).await?;
                Ok(())
            })
            .await?;
        counted
            .bounded(&what("purge"), 100, async {
                store.purge(Purge::new(Duration::ZERO, 100)).await?;
                Ok(())
            })
            .await?;
        let inbox = MySqlInbox::new(&counted.lab.schema, "mail")?;
        let mut consumer = counted.lab.connect().await?;
        counted
            .bounded(&what("purge of the inbox"), 100, async {
                let old = inbox.purge(&mut consumer, Duration::from_secs(3_600), 100).await?;
                assert_eq!(old, 50);
                Ok(())
            })
            .await?;
        let all = lanes(4);
        let page = Page::new(&all, Position(100), 120);
        let rows = deliveries(store.claim(Claim::new(MEGABYTE).page(page)).await?);
        let (_, leases) = counted.lab.take_all().await?;
        let failed: Vec<_> = rows
            .iter()
            .zip([Settlement::Retry(TTL), Settlement::Held, Settlement::Dead].iter().cycle())
            .map(|(row, settlement)| {
                let lease = leases[usize::from(row.lane.0)];
                let failure = Failure::new("failed", "why");
                Failed::new(id_of(row), lease, row.state, 1, settlement.clone(), failure)
            })
            .collect();
        counted
            .bounded(&what("failures"), 120, async {
                assert_eq!(store.settle(Settle::new(&[], &failed)).await?.refused, []);
                Ok(())
            })
            .await?;
    }
    Ok(())
}

/// What is counted of a large table is bounded: twice the rows cost the same.
async fn the_backlog_of_a_large_table_is_cheap(engine: Engine) -> Result<()> {
    let Some(mut counted) = Counted::new(engine).await? else { return Ok(()) };
    let store = counted.lab.store.clone();
    let mut costs = Vec::new();
    for _ in 0..2 {
        let before = counted.reads().await?;
        let backlog = store.backlog().await?;
        costs.push(counted.reads().await? - before);
        assert!(!backlog.pending_is_exact);
        assert_eq!(backlog.pending, Backlog::EXACT_LIMIT);
        counted.lab.add((0..ROWS).map(|n| message(&n.to_string())).collect()).await?;
    }
    assert!(costs[1] <= costs[0] + BESIDES, "{costs:?}");
    Ok(())
}

on_each! {
    every_list_is_read_by_primary_key
    a_row_is_archived_by_its_receipt_in_a_table_that_is_taken_for_empty
    statements_do_not_go_by_what_the_server_thinks_of_a_table
    the_backlog_of_a_large_table_is_cheap
}
