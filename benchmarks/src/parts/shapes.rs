//! The drain under other shapes: numbers of lanes, sizes of payloads and of the window.

use anyhow::Result;

use super::drain::{DELETERS, PARTITIONS, USUAL, drain, drain_by};
use crate::{
    cpu::Cpu,
    lab::{Lab, per_second},
    raw::{self, Share},
    report::Page,
    site::{Backlog, Site, Topic},
    stats::{Runs, rate, share},
};

pub(crate) async fn lanes(lab: &Lab) -> Result<Page> {
    let count = lab.pick(50_000, 500_000);
    let mut page = Page::new("Lanes");
    page.say(format!("The drain of {count} messages by one relay, by the number of lanes."));
    let mut rows = vec![];
    for engine in lab.engines() {
        let numbers = [1, 16, 64];
        let mut sites = vec![];
        for number in numbers {
            sites.push((number, Site::with_lanes(lab, engine, number).await?, Runs::default()));
        }
        for _ in 0..lab.pick(1, 3) {
            for (number, site, runs) in &mut sites {
                let reached = one_drain(lab, site, Backlog::of(count)).await?;
                lab.progress(format!("{engine}, {number} lanes: {}/s", rate(reached)));
                runs.push(reached);
            }
        }
        let usual = sites[1].2.median();
        for (number, _, runs) in &sites {
            let by_usual = share(runs.median() / usual);
            rows.push([engine.to_string(), number.to_string(), runs.rate(), by_usual]);
        }
    }
    page.table(["", "lanes", "messages/s", "by 16 lanes"], &rows);
    Ok(page)
}

async fn one_drain(lab: &Lab, site: &Site, backlog: Backlog) -> Result<f64> {
    let kafka = lab.kafka().await?;
    let topic = Topic::new(kafka, PARTITIONS).await?;
    site.fill(&topic.name, backlog).await?;
    let (time, _) = drain(lab, site, kafka, backlog.rows).await?;
    site.must_be_empty().await?;
    topic.delete().await?;
    Ok(per_second(backlog.rows, time))
}

pub(crate) async fn payloads(lab: &Lab) -> Result<Page> {
    let mut page = Page::new("Payloads");
    page.say(
        "The drain by the size of the payloads, beside the limit (the three stages overlapped) in \
         the same run.",
    );
    let kafka = lab.kafka().await?;
    let mut rows = vec![];
    for engine in lab.engines() {
        let site = Site::new(lab, engine).await?;
        for (name, payload, few, many) in [
            ("100 B", 100, 30_000, 500_000),
            ("1 KiB", 1_024, 30_000, 300_000),
            ("64 KiB", 65_536, 600, 10_000),
            ("900 kB", 900_000, 60, 1_000),
        ] {
            let backlog = Backlog { payload, ..Backlog::of(lab.pick(few, many)) };
            let (mut ours, mut limit) = (Runs::default(), Runs::default());
            for _ in 0..lab.pick(1, 3) {
                ours.push(one_drain(lab, &site, backlog).await?);
                let topic = Topic::new(kafka, PARTITIONS).await?;
                site.fill(&topic.name, backlog).await?;
                let bootstrap = kafka.bootstrap();
                let count = async || Ok(());
                let name = &topic.name;
                let shares = [Share::all(backlog.rows)];
                let (time, ()) =
                    raw::overlapped(&site, bootstrap, name, &shares, DELETERS, USUAL, count)
                        .await?;
                limit.push(per_second(backlog.rows, time));
                topic.delete().await?;
            }
            let ratio = ours.ratio(&limit);
            lab.progress(format!(
                "{engine}, {name}: {}/s, {} of the limit",
                rate(ours.median()),
                share(ratio.median())
            ));
            let bytes = ours.median() * payload as f64 / 1e6;
            rows.push([
                engine.to_string(),
                name.to_owned(),
                ours.rate(),
                format!("{bytes:.0}"),
                limit.rate(),
                ratio.show(share),
            ]);
        }
    }
    page.table(["", "payload", "messages/s", "MB/s", "limit, messages/s", "ratio"], &rows);
    Ok(page)
}

pub(crate) async fn windows(lab: &Lab) -> Result<Page> {
    let count = lab.pick(50_000, 500_000);
    let mut page = Page::new("Windows");
    page.say(format!(
        "The drain of {count} messages by the number of rows that may be published and not yet \
         settled, which is also the bound of duplicates for each fault; a topic may use half of \
         it. Larger windows make larger requests to Kafka. Processor time of each message in µs."
    ));
    let kafka = lab.kafka().await?;
    let mut rows = vec![];
    for engine in lab.engines() {
        let site = Site::new(lab, engine).await?;
        let mut windows =
            [5_000, 10_000, 20_000, 40_000].map(|window| (window, Runs::default(), Cpu::default()));
        let rounds = lab.pick(1, 3);
        for _ in 0..rounds {
            for (window, runs, used) in &mut windows {
                let topic = Topic::new(kafka, PARTITIONS).await?;
                site.fill(&topic.name, Backlog::of(count)).await?;
                let (time, cpu) =
                    drain_by(lab, &site, kafka, count, |it| it.rows_in_flight(*window)).await?;
                runs.push(per_second(count, time));
                *used += cpu;
                topic.delete().await?;
                lab.progress(format!("{engine}, window {window}: {}/s", rate(runs.median())));
            }
        }
        for (window, runs, cpu) in &windows {
            let [database, kafka, relay, client] = cpu.of_each(count * rounds);
            let window = window.to_string();
            rows.push([engine.to_string(), window, runs.rate(), database, kafka, relay, client]);
        }
    }
    page.table(["", "window", "messages/s", "database", "Kafka", "relay", "librdkafka"], &rows);
    Ok(page)
}
