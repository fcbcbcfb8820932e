//! A backlog is drained: ours beside the limit, in pairs, and beside the usual loops.

use std::time::Duration;

use anyhow::Result;
use integration_tests::{database::Engine, kafka::Kafka};
use outbox_core::DispatcherBuilder;
use outbox_kafka::KafkaBroker;

use crate::{
    cpu::Cpu,
    lab::{Lab, per_second},
    loops,
    plot::Bars,
    raw,
    relay::Relay,
    report::Page,
    site::{Backlog, Site, Topic},
    stats::{Runs, rate, share},
};

pub(crate) const PARTITIONS: i32 = 8;
/// Connections that delete: one more was no faster.
pub(crate) const DELETERS: usize = 2;
const PATIENCE: Duration = Duration::from_secs(600);

pub(crate) async fn run(lab: &Lab) -> Result<Page> {
    let rows = lab.pick(300_000, 1_000_000);
    let mut page = Page::new("Drain");
    page.say(format!(
        "A backlog of {rows} messages of 1 KiB over 10,000 keys is published to {PARTITIONS} \
         partitions and deleted. The limit is the same three stages (a keyset read, a produce, a \
         delete by lists of ids over {DELETERS} connections) overlapped with nothing in between: \
         no order per key, no lease, no retry. Ours and the limit alternate; a ratio is of runs \
         side by side. Medians, with the least and the most in brackets; rates are messages a \
         second."
    ));
    for engine in lab.engines() {
        of(lab, engine, rows, &mut page).await?;
    }
    Ok(page)
}

async fn of(lab: &Lab, engine: Engine, rows: usize, page: &mut Page) -> Result<()> {
    let site = Site::new(lab, engine).await?;
    let kafka = lab.kafka().await?;
    let backlog = Backlog::of(rows);
    let (mut ours, mut limit) = (Runs::default(), Runs::default());
    let (mut our_cpu, mut limit_cpu) = (Cpu::default(), Cpu::default());
    let pairs = lab.pick(3, 5);
    for pair in 0..pairs {
        // Whoever comes first may find the machine in another state.
        for first in [pair % 2 == 0, pair % 2 != 0] {
            let topic = Topic::new(kafka, PARTITIONS).await?;
            site.fill(&topic.name, backlog).await?;
            let before = lab.cpu(engine).await?;
            if first {
                let (time, cpu) = drain(lab, &site, kafka, rows).await?;
                our_cpu += cpu;
                ours.push(per_second(rows, time));
                lab.progress(format!("{engine}: outbox {}/s", rate(per_second(rows, time))));
            } else {
                let count = async || lab.cpu(engine).await;
                let bootstrap = kafka.bootstrap();
                let (time, after) =
                    raw::overlapped(&site, bootstrap, &topic.name, rows, DELETERS, count).await?;
                limit_cpu += after - before;
                limit.push(per_second(rows, time));
                lab.progress(format!("{engine}: limit {}/s", rate(per_second(rows, time))));
            }
            site.must_be_empty().await?;
            topic.delete().await?;
        }
    }
    let stages = stages(lab, &site, kafka, rows).await?;
    let loops = loops(lab, &site, kafka, rows).await?;

    let ratio = ours.ratio(&limit);
    page.say(format!("## {engine}"));
    let mut table = vec![
        ["**outbox**".to_owned(), ours.rate(), "1.00".to_owned()],
        [
            "**limit: read, produce and delete overlapped**".to_owned(),
            limit.rate(),
            share(1.0 / ratio.median()),
        ],
    ];
    let relative = |runs: &Runs| share(runs.median() / ours.median());
    for (name, runs) in stages.iter().chain(&loops) {
        table.push([(*name).to_owned(), runs.rate(), relative(runs)]);
    }
    page.table(["", "messages/s", "by outbox"], &table);
    let all = (rows * pairs) as f64 / 1e6;
    let row = |name: &str, cpu: &Cpu| {
        let each = |seconds: f64| format!("{:.1}", seconds / all);
        [
            name.to_owned(),
            each(cpu.database),
            each(cpu.kafka),
            each(cpu.relay),
            each(cpu.client),
            each(cpu.total()),
        ]
    };
    page.say("Processor time of each message, in µs:");
    page.table(
        ["", "database", "Kafka", "relay (with sqlx)", "librdkafka", "together"],
        &[row("outbox", &our_cpu), row("limit", &limit_cpu)],
    );
    let mut bars = vec![
        ("outbox".to_owned(), ours.median()),
        ("limit: overlapped".to_owned(), limit.median()),
    ];
    bars.extend(stages.iter().chain(&loops).map(|(n, r)| ((*n).to_owned(), r.median())));
    page.bars(
        &format!("drain-{engine}"),
        &Bars { title: format!("Drain, {engine}"), unit: "messages a second".to_owned(), bars },
    );
    let (skip, classic) =
        (ours.median() / loops[0].1.median(), ours.median() / loops[1].1.median());
    page.verdict(
        format!("{engine}: outbox by the overlapped limit"),
        ratio.show(share),
        ">= 0.90",
        ratio.median() >= 0.90,
    );
    page.verdict(
        format!("{engine}: outbox by the classic loop"),
        format!("{classic:.0}"),
        ">= 25",
        classic >= 25.0,
    );
    page.verdict(
        format!("{engine}: outbox by four SKIP LOCKED loops"),
        share(skip),
        "> 1",
        skip > 1.0,
    );
    Ok(())
}

/// Drains a backlog of so many rows with our relay, as it is by default.
pub(crate) async fn drain(
    lab: &Lab,
    site: &Site,
    kafka: &Kafka,
    rows: usize,
) -> Result<(Duration, Cpu)> {
    drain_by(lab, site, kafka, rows, |builder| builder).await
}

/// The same with other settings.
pub(crate) async fn drain_by(
    lab: &Lab,
    site: &Site,
    kafka: &Kafka,
    rows: usize,
    change: impl FnOnce(DispatcherBuilder) -> DispatcherBuilder,
) -> Result<(Duration, Cpu)> {
    let broker = KafkaBroker::builder(kafka.bootstrap()).build()?;
    let before = lab.cpu(site.engine).await?;
    let relay = Relay::start(site, broker, change)?;
    let done = relay.settled(rows, PATIENCE).await?;
    let cpu = lab.cpu(site.engine).await? - before;
    let time = done - relay.began;
    relay.stop().await?;
    Ok((time, cpu))
}

type Named = Vec<(&'static str, Runs)>;

/// Each stage alone.
async fn stages(lab: &Lab, site: &Site, kafka: &Kafka, rows: usize) -> Result<Named> {
    let (mut read, mut produce, mut one, mut two) =
        (Runs::default(), Runs::default(), Runs::default(), Runs::default());
    for _ in 0..lab.pick(1, 3) {
        let topic = Topic::new(kafka, PARTITIONS).await?;
        for (deleters, runs) in [(1, &mut one), (DELETERS, &mut two)] {
            site.fill(&topic.name, Backlog::of(rows)).await?;
            read.push(per_second(rows, raw::read(site, rows).await?));
            if deleters == 1 {
                let time = raw::produce(site, kafka.bootstrap(), &topic.name, rows).await?;
                produce.push(per_second(rows, time));
            }
            runs.push(per_second(rows, raw::delete(site, rows, deleters).await?));
            site.must_be_empty().await?;
        }
        topic.delete().await?;
        lab.progress(format!("{}: each stage alone", site.engine));
    }
    Ok(vec![
        ("keyset read alone", read),
        ("produce from memory alone", produce),
        ("delete alone, one connection", one),
        ("delete alone, two connections", two),
    ])
}

async fn loops(lab: &Lab, site: &Site, kafka: &Kafka, rows: usize) -> Result<Named> {
    let (mut skip, mut classic) = (Runs::default(), Runs::default());
    let few = lab.pick(2_000, 20_000);
    for _ in 0..lab.pick(1, 3) {
        let topic = Topic::new(kafka, PARTITIONS).await?;
        site.fill(&topic.name, Backlog::of(rows)).await?;
        let time = loops::classic(site, kafka.bootstrap(), &topic.name, few).await?;
        classic.push(per_second(few, time));
        site.rest().await?;
        let time = loops::skip_locked(site, kafka.bootstrap(), &topic.name, rows, 4).await?;
        skip.push(per_second(rows, time));
        site.must_be_empty().await?;
        topic.delete().await?;
        lab.progress(format!("{}: the usual loops", site.engine));
    }
    Ok(vec![("four SKIP LOCKED loops of 500", skip), ("classic loop, one by one", classic)])
}
