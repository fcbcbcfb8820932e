//! What adding a message costs the application.

use std::time::{Duration, Instant};

use anyhow::Result;
use integration_tests::database::Engine;
use outbox_core::Message;
use outbox_mysql::{MySqlOutbox, MySqlWriter};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection};

use crate::{
    lab::{Lab, per_second},
    report::Page,
    site::{Site, run as execute},
    stats::{Runs, share},
    writers::{self, insert_order},
};

/// Transactions of one turn: long enough to time, short enough that all meet the same weather.
const TURN: usize = 200;

/// The table as others would write it, and what each part of ours adds to it.
const TABLES: [(&str, &str); 4] = [
    ("plain table", ""),
    ("and the lane", LANE),
    (
        "and the CHECKs",
        "lane SMALLINT UNSIGNED NOT NULL DEFAULT (CRC32(COALESCE(message_key, message_id)) MOD 16), \
         CHECK (lane = CRC32(COALESCE(message_key, message_id)) MOD 16), \
         CHECK (OCTET_LENGTH(topic) BETWEEN 1 AND 249), \
         CHECK (OCTET_LENGTH(message_key) <= 1024), CHECK (OCTET_LENGTH(headers) <= 65536), \
         CHECK (OCTET_LENGTH(payload) <= 15728640), ",
    ),
    ("and 64 partitions (not ours)", LANE),
];
const LANE: &str =
    "lane SMALLINT UNSIGNED NOT NULL DEFAULT (CRC32(COALESCE(message_key, message_id)) MOD 16), ";

fn table(index: usize, name: &str) -> String {
    let (_, parts) = TABLES[index];
    let (key, partitions) = if index == 3 {
        ("PRIMARY KEY (id, lane)", "PARTITION BY HASH (lane) PARTITIONS 64")
    } else {
        ("PRIMARY KEY (id)", "")
    };
    format!(
        "DROP TABLE IF EXISTS {name}; \
         CREATE TABLE {name} (id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT, \
         message_id BINARY(16) NOT NULL, topic VARCHAR(250) CHARACTER SET ascii NOT NULL, \
         message_key VARBINARY(1025) NULL, partition_no INT NULL, headers MEDIUMBLOB NULL, \
         payload LONGBLOB NULL, {parts} \
         created_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6)), {key}) {partitions}"
    )
}

pub(crate) async fn run(lab: &Lab) -> Result<Page> {
    let turns = lab.pick(2, 40);
    let mut page = Page::new("The write path");
    page.say(format!(
        "One connection commits {TURN} transactions of one business row and one message of 1 KiB, \
         {turns} times each way, in turns. The bare way inserts the same bytes by one prepared \
         statement of sqlx into a plain table: no lane, no CHECK. µs for each transaction, or for \
         each row where many are added by one call; medians of the turns."
    ));
    for engine in lab.engines() {
        of(lab, engine, turns, &mut page).await?;
    }
    Ok(page)
}

/// What one transaction does besides the business row.
#[derive(Debug, Clone, Copy)]
enum Way {
    Nothing,
    /// Inserts into the table of that number.
    Bare(usize),
    /// The same, after the question whether a transaction is open.
    Checked,
    Add,
}

async fn of(lab: &Lab, engine: Engine, turns: usize, page: &mut Page) -> Result<()> {
    let site = Site::new(lab, engine).await?;
    writers::prepare(&site).await?;
    let mut connection = site.connect().await?;
    for index in 0..TABLES.len() {
        execute(&mut connection, &table(index, &format!("table_{index}"))).await?;
    }
    let outbox = MySqlOutbox::new(MySqlWriter::new(&site.schema));
    let ways = [
        ("business row alone", Way::Nothing),
        ("bare INSERT, plain table", Way::Bare(0)),
        ("bare INSERT, and the lane", Way::Bare(1)),
        ("bare INSERT, and the CHECKs", Way::Bare(2)),
        ("bare INSERT, 64 partitions (not ours)", Way::Bare(3)),
        ("bare INSERT, plain table, and the question for a transaction", Way::Checked),
        ("**add**", Way::Add),
    ];
    let mut times = vec![Runs::default(); ways.len()];
    for turn in 0..=turns {
        for (number, (_, way)) in ways.iter().enumerate() {
            let took = transactions(&mut connection, &outbox, *way).await?;
            // The first turn prepares statements.
            if turn > 0 {
                times[number].push(took.as_secs_f64() * 1e6 / TURN as f64);
            }
        }
    }
    page.say(format!("## {engine}"));
    let micros = |runs: &Runs| runs.show(|value| format!("{value:.0}"));
    let bare = times[1].median();
    let rows: Vec<[String; 4]> = ways
        .iter()
        .zip(&times)
        .map(|((name, _), runs)| {
            [
                (*name).to_owned(),
                micros(runs),
                format!("{:.0}", runs.median() - times[0].median()),
                share(runs.median() / bare),
            ]
        })
        .collect();
    page.table(["transaction", "µs", "above the business row", "by the bare INSERT"], &rows);
    let ratio = times[6].ratio(&times[1]);
    page.verdict(
        format!("{engine}: transaction with `add` by one with the bare INSERT"),
        share(ratio.median()),
        "<= 1.15",
        ratio.median() <= 1.15,
    );
    lab.progress(format!("{engine}: add by bare {}", share(ratio.median())));
    many(lab, &site, &outbox, page).await
}

async fn transactions(
    connection: &mut MySqlConnection,
    outbox: &MySqlOutbox,
    way: Way,
) -> Result<Duration> {
    let payload = [b'p'; 1024];
    let messages: Vec<Message> =
        (0..TURN).map(|index| message(index, &payload)).collect::<Result<_>>()?;
    let began = Instant::now();
    for (index, message) in messages.into_iter().enumerate() {
        let mut tx = connection.begin().await?;
        insert_order(&mut tx, index).await?;
        match way {
            Way::Nothing => {}
            Way::Bare(table) => bare(&mut tx, table, &message).await?,
            Way::Checked => {
                let check = "SAVEPOINT outbox_add; RELEASE SAVEPOINT outbox_add";
                execute(&mut tx, check).await?;
                bare(&mut tx, 0, &message).await?;
            }
            Way::Add => {
                outbox.add(&mut tx, message).await?;
            }
        }
        tx.commit().await?;
    }
    Ok(began.elapsed())
}

fn message(index: usize, payload: &[u8]) -> Result<Message> {
    let key = format!("key-{}", index % 10_000);
    Ok(Message::builder("orders").key(key).payload(payload.to_vec()).build()?)
}

async fn bare(connection: &mut MySqlConnection, table: usize, message: &Message) -> Result<()> {
    let text = format!(
        "INSERT INTO table_{table} (message_id, topic, message_key, payload) VALUES (?, ?, ?, ?)"
    );
    sqlx::query(AssertSqlSafe(text))
        .bind(&message.id().as_bytes()[..])
        .bind(message.topic())
        .bind(message.key())
        .bind(message.payload())
        .execute(connection)
        .await?;
    Ok(())
}

/// Many messages by one call.
async fn many(lab: &Lab, site: &Site, outbox: &MySqlOutbox, page: &mut Page) -> Result<()> {
    let mut connection = site.connect().await?;
    let payload = [b'p'; 1024];
    let sizes = [1, 100, 500];
    let mut rates = [Runs::default(), Runs::default(), Runs::default()];
    for round in 0..=lab.pick(1, 10) {
        for (size, runs) in sizes.iter().zip(&mut rates) {
            let calls = 1_000_usize.div_ceil(*size);
            let mut batches = vec![];
            for _ in 0..calls {
                let batch = (0..*size).map(|index| message(index, &payload));
                batches.push(batch.collect::<Result<Vec<_>>>()?);
            }
            let began = Instant::now();
            for batch in batches {
                let mut tx = connection.begin().await?;
                outbox.add_all(&mut tx, batch).await?;
                tx.commit().await?;
            }
            if round > 0 {
                runs.push(per_second(calls * size, began.elapsed()));
            }
        }
        execute(&mut connection, "TRUNCATE TABLE outbox").await?;
    }
    let rows: Vec<[String; 3]> = sizes
        .iter()
        .zip(&rates)
        .map(|(size, runs)| {
            let by_single = share(runs.median() / rates[0].median());
            [format!("add_all of {size}, a transaction each"), runs.rate(), by_single]
        })
        .collect();
    page.table(["", "messages/s", "by single adds"], &rows);
    let ratio = rates[2].ratio(&rates[0]).median();
    page.verdict(
        format!("{}: `add_all(500)` by single adds", site.engine),
        format!("{ratio:.1}"),
        ">= 5",
        ratio >= 5.0,
    );
    Ok(())
}
