//! What stands in the way: a held key with many rows behind it, a purge that an old snapshot
//! blocks, an archive that has grown.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use outbox_core::retry::Retention;
use outbox_kafka::KafkaBroker;

use super::drain::PARTITIONS;
use crate::{
    lab::{Lab, per_second},
    relay::Relay,
    report::Page,
    site::{Backlog, Site, Topic, run as execute},
    stats::{Runs, rate, share},
};

const PATIENCE: Duration = Duration::from_secs(900);
/// Of a hundred rows, so many are of the held key.
const HELD: usize = 10;

pub(crate) async fn key(lab: &Lab) -> Result<Page> {
    // Both make whole hundreds with those of the held key.
    let others = lab.pick(45_000, 900_000);
    let behind = others * HELD / (100 - HELD);
    let mut page = Page::new("A blocked key");
    page.say(format!(
        "One key is held: its first message waits for an operator, and {behind} more wait behind \
         it, spread evenly among {others} messages of other keys. The same messages of other keys \
         are drained without it, in turns. Messages a second, of the other keys alone; the relay \
         starts anew, so the rows of the held key are read once as well."
    ));
    let mut rows = vec![];
    for engine in lab.engines() {
        let site = Site::new(lab, engine).await?;
        let (mut free, mut blocked) = (Runs::default(), Runs::default());
        for round in 0..lab.pick(1, 3) {
            for held in [round % 2 == 0, round % 2 != 0] {
                let reached = drain_others(lab, &site, others, behind, held).await?;
                lab.progress(format!("{engine}, held {held}: {}/s", rate(reached)));
                if held { &mut blocked } else { &mut free }.push(reached);
            }
        }
        let ratio = blocked.ratio(&free);
        rows.push([engine.to_string(), free.rate(), blocked.rate(), ratio.show(share)]);
        page.verdict(
            format!("{engine}: other keys beside a held one"),
            ratio.show(share),
            ">= 0.90",
            ratio.median() >= 0.90,
        );
    }
    page.table(["", "without it", "beside it", "ratio"], &rows);
    Ok(page)
}

async fn drain_others(
    lab: &Lab,
    site: &Site,
    others: usize,
    behind: usize,
    held: bool,
) -> Result<f64> {
    let kafka = lab.kafka().await?;
    let topic = Topic::new(kafka, PARTITIONS).await?;
    let backlog = if held {
        Backlog { hot: HELD, ..Backlog::of(others + behind) }
    } else {
        Backlog::of(others)
    };
    site.fill(&topic.name, backlog).await?;
    if held {
        let mut connection = site.connect().await?;
        let hold = "UPDATE outbox SET held_at = UTC_TIMESTAMP(6) WHERE id = 1; \
                    REPLACE INTO outbox_held (outbox_id, message_id, topic, message_key, held_at) \
                    SELECT id, message_id, topic, message_key, held_at FROM outbox WHERE id = 1";
        execute(&mut connection, hold).await?;
    }
    let broker = KafkaBroker::builder(kafka.bootstrap()).build()?;
    let relay = Relay::start(site, broker, |builder| builder)?;
    let done = relay.settled(others, PATIENCE).await?;
    let time = done - relay.began;
    relay.stop().await?;
    let left = site.left().await?;
    let expected = if held { behind } else { 0 };
    anyhow::ensure!(left == expected, "{left} rows are left, not {expected}");
    topic.delete().await?;
    Ok(per_second(others, time))
}

pub(crate) async fn purge(lab: &Lab) -> Result<Page> {
    let count = lab.pick(50_000, 500_000);
    let mut page = Page::new("A blocked purge");
    page.say(format!(
        "A transaction with an open snapshot keeps InnoDB from removing deleted rows while \
         {count} messages are drained: whoever reads the table from its head walks over more and \
         more of them. Messages a second in each fifth of the drain."
    ));
    let mut rows = vec![];
    for engine in lab.engines() {
        let site = Site::new(lab, engine).await?;
        let kafka = lab.kafka().await?;
        let mut ratios = Runs::default();
        for _ in 0..lab.pick(1, 3) {
            let topic = Topic::new(kafka, PARTITIONS).await?;
            site.fill(&topic.name, Backlog::of(count)).await?;
            let mut old = site.connect().await?;
            let snapshot = "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ; \
                            START TRANSACTION WITH CONSISTENT SNAPSHOT; \
                            SELECT COUNT(*) FROM outbox_meta";
            execute(&mut old, snapshot).await?;
            let broker = KafkaBroker::builder(kafka.bootstrap()).build()?;
            let relay = Relay::start(&site, broker, |builder| builder)?;
            relay.settled(count, PATIENCE).await?;
            let mut marks = vec![];
            for fifth in 0..=5 {
                // From the first settle on: a start is no part of a rate.
                marks.push(relay.settled((fifth * count / 5).max(1), PATIENCE).await?);
            }
            relay.stop().await?;
            execute(&mut old, "ROLLBACK").await?;
            topic.delete().await?;
            let rates: Vec<f64> =
                marks.windows(2).map(|pair| per_second(count / 5, pair[1] - pair[0])).collect();
            let ratio = rates[4] / rates[0];
            lab.progress(format!("{engine}: last fifth by first {}", share(ratio)));
            ratios.push(ratio);
            let [a, b, c, d, e] = [0, 1, 2, 3, 4].map(|fifth| rate(rates[fifth]));
            rows.push([engine.to_string(), a, b, c, d, e, share(ratio)]);
        }
        page.verdict(
            format!("{engine}: last fifth by the first, purge blocked"),
            ratios.show(share),
            ">= 0.90",
            ratios.median() >= 0.9,
        );
    }
    page.table(["", "first", "second", "third", "fourth", "fifth", "last by first"], &rows);
    Ok(page)
}

pub(crate) async fn archive(lab: &Lab) -> Result<Page> {
    let count = lab.pick(20_000, 300_000);
    let sizes = lab.pick(vec![0, 50_000], vec![0, 1_000_000, 5_000_000]);
    let mut page = Page::new("Retained rows");
    page.say(format!(
        "Delivered messages are kept in the archive, which holds rows already (of 1 KiB); {count} \
         messages are drained beside it. Messages a second; first without an archive at all."
    ));
    let mut rows = vec![];
    for engine in lab.engines() {
        let site = Site::new(lab, engine).await?;
        let mut measured: Vec<Runs> = vec![];
        let deleting = archived(lab, &site, count, Retention::Delete, 0).await?;
        let mut retained = 0;
        for size in &sizes {
            retain(lab, &site, retained, *size).await?;
            retained = *size;
            let mut runs = Runs::default();
            for _ in 0..lab.pick(1, 3) {
                let keep = Retention::Keep(Duration::from_secs(86_400));
                runs.push(archived(lab, &site, count, keep, *size).await?);
            }
            lab.progress(format!("{engine}, {size} retained: {}/s", rate(runs.median())));
            measured.push(runs);
        }
        let first = measured.first().context("a size")?.median();
        rows.push([
            engine.to_string(),
            "no archive".to_owned(),
            rate(deleting),
            share(deleting / first),
        ]);
        for (size, runs) in sizes.iter().zip(&measured) {
            rows.push([
                engine.to_string(),
                size.to_string(),
                runs.rate(),
                share(runs.median() / first),
            ]);
        }
        let last = measured.last().context("a size")?.median() / first;
        page.verdict(
            format!("{engine}: drain beside the fullest archive by an empty one"),
            share(last),
            ">= 0.90",
            last >= 0.9,
        );
    }
    page.table(["", "rows in the archive", "messages/s", "by an empty one"], &rows);
    Ok(page)
}

/// Fills the archive up from `from` to `to` rows, of messages of long ago.
async fn retain(lab: &Lab, site: &Site, from: usize, to: usize) -> Result<()> {
    let began = Instant::now();
    let mut connection = site.connect().await?;
    execute(&mut connection, "SET SESSION sql_log_bin = 0").await?;
    for first in (from..to).step_by(10_000) {
        let count = 10_000.min(to - first);
        let statement = format!(
            "INSERT INTO outbox_delivered (outbox_id, message_id, topic, message_key, payload, \
               created_at, attempts, delivered_at) \
             SELECT 1000000000 + i, UNHEX(CONCAT('00', LPAD(HEX(i), 10, '0'), '70008000', \
                 LPAD(HEX(i), 12, '0'))), 'old', CONCAT('key-', i MOD 10000), \
               RPAD('x', 1024, 'the quick brown fox '), UTC_TIMESTAMP(6), 0, UTC_TIMESTAMP(6) \
             FROM (SELECT n + {first} i FROM numbers WHERE n < {count}) s"
        );
        execute(&mut connection, &statement).await?;
    }
    if to > from {
        let took = began.elapsed().as_secs();
        lab.progress(format!("{}: {to} rows are in the archive ({took} s)", site.engine));
    }
    Ok(())
}

async fn archived(
    lab: &Lab,
    site: &Site,
    count: usize,
    retention: Retention,
    retained: usize,
) -> Result<f64> {
    let kafka = lab.kafka().await?;
    let topic = Topic::new(kafka, PARTITIONS).await?;
    // What an earlier run put there goes, so that the archive is as large as it should be.
    let mut connection = site.connect().await?;
    execute(&mut connection, "DELETE FROM outbox_delivered WHERE topic <> 'old'").await?;
    site.fill(&topic.name, Backlog::of(count)).await?;
    let broker = KafkaBroker::builder(kafka.bootstrap()).build()?;
    let relay = Relay::start(site, broker, |builder| builder.retention(retention))?;
    let done = relay.settled(count, PATIENCE).await?;
    let time = done - relay.began;
    relay.stop().await?;
    site.must_be_empty().await?;
    if retention != Retention::Delete {
        let query = "SELECT COUNT(*) FROM outbox_delivered";
        let there: usize = crate::site::first(&mut connection, query).await?.parse()?;
        anyhow::ensure!(there == count + retained, "the archive holds {there} rows");
    }
    topic.delete().await?;
    Ok(per_second(count, time))
}
