//! A backlog is drained: ours beside the limit, in pairs, and beside the usual loops.

use std::time::Duration;

use anyhow::{Result, bail};
use integration_tests::{database::Engine, kafka::Kafka};
use outbox_core::DispatcherBuilder;
use outbox_kafka::KafkaBroker;

use crate::{
    cpu::Cpu,
    lab::{Lab, per_second},
    loops,
    plot::Bars,
    raw::{self, Share, Stages},
    relay::Relay,
    report::Page,
    site::{Backlog, Site, Topic},
    stats::{Runs, rate, share},
};

pub(crate) const PARTITIONS: i32 = 8;
/// Connections that delete: one more was no faster.
pub(crate) const DELETERS: usize = 2;
/// Records and binary log as those of our relay by default.
pub(crate) const USUAL: Stages = Stages { ids: true, keys_only: false, ranges: false };
const PATIENCE: Duration = Duration::from_secs(600);

pub(crate) async fn run(lab: &Lab) -> Result<Page> {
    let rows = lab.pick(100_000, 1_000_000);
    let mut page = Page::new("Drain");
    page.say(format!(
        "A backlog of {rows} messages of 1 KiB over 10,000 keys is published to {PARTITIONS} \
         partitions and deleted. The limit is the same three stages (a keyset read, a produce of \
         the same records, a delete by lists of ids over {DELETERS} connections) overlapped with \
         nothing in between: no order per key, no lease, no retry. A second one deletes what was \
         acknowledged by ranges where ids follow each other, the lowest first, as ours nearly does. \
         Ours and the limits take turns, after one drain that is not counted; a ratio is of runs \
         side by side. All run in one process whose allocator is mimalloc. Medians, with the \
         least and the most in brackets; rates are messages a second."
    ));
    for engine in lab.engines() {
        of(lab, engine, rows, &mut page).await?;
    }
    Ok(page)
}

async fn of(lab: &Lab, engine: Engine, rows: usize, page: &mut Page) -> Result<()> {
    let site = Site::new(lab, engine).await?;
    let kafka = lab.kafka().await?;
    filled(lab, &site, kafka, rows).await?;
    let rounds = lab.pick(1, 4);
    let by_ranges = Stages { ranges: true, ..USUAL };
    let Sides { ours, our_cpu, limits } =
        sides(lab, &site, kafka, rows, rounds, &[USUAL, by_ranges]).await?;
    let [(limit, limit_cpu), (ranged, ranged_cpu)] = &limits[..] else { bail!("two limits") };
    site.let_relay_log_keys_only(true).await?;
    let keys_only = Stages { keys_only: true, ..USUAL };
    let brief = sides(lab, &site, kafka, rows, lab.pick(1, 2), &[keys_only]).await?;
    site.let_relay_log_keys_only(false).await?;
    let mut bare = Runs::default();
    for _ in 0..lab.pick(1, 2) {
        let stages = Stages { ids: false, ..USUAL };
        bare.push(per_second(rows, overlapped(lab, &site, kafka, rows, 1, stages).await?.0));
    }
    let stages = stages(lab, &site, kafka, rows).await?;
    let loops = loops(lab, &site, kafka, rows).await?;

    let (ratio, ranged_ratio) = (ours.ratio(limit), ours.ratio(ranged));
    page.say(format!("## {engine}"));
    let mut table = vec![
        ["**outbox**".to_owned(), ours.rate(), "1.00".to_owned()],
        [
            "**limit: read, produce and delete overlapped**".to_owned(),
            limit.rate(),
            share(1.0 / ratio.median()),
        ],
        [
            "**the same, deleted by ranges**".to_owned(),
            ranged.rate(),
            share(1.0 / ranged_ratio.median()),
        ],
    ];
    let relative = |runs: &Runs| share(runs.median() / ours.median());
    let [(brief_limit, _)] = &brief.limits[..] else { bail!("one limit") };
    let others = [
        ("limit, records without the message's id", bare),
        ("outbox, the binary log keeps only keys of deleted rows", brief.ours),
        ("limit, the same", brief_limit.clone()),
    ];
    for (name, runs) in others.iter().chain(&stages).chain(&loops) {
        table.push([(*name).to_owned(), runs.rate(), relative(runs)]);
    }
    page.table(["", "messages/s", "by outbox"], &table);
    let all = (rows * rounds) as f64 / 1e6;
    let row = |name: &str, cpu: &Cpu| {
        let [database, kafka, relay, client] = cpu.of_each(rows * rounds);
        [name.to_owned(), database, kafka, relay, client, format!("{:.1}", cpu.total() / all)]
    };
    page.say("Processor time of each message, in µs:");
    page.table(
        ["", "database", "Kafka", "relay (with sqlx)", "librdkafka", "together"],
        &[
            row("outbox", &our_cpu),
            row("limit", limit_cpu),
            row("limit, deleted by ranges", ranged_cpu),
        ],
    );
    page.say(format!(
        "The threads of the limit run sqlx and hand over to librdkafka, as the relay's do. What the \
         relay takes beyond them is our code: {:.1} µs a message, {:.1} beyond the limit that \
         deletes by ranges.",
        (our_cpu.relay - limit_cpu.relay) / all,
        (our_cpu.relay - ranged_cpu.relay) / all,
    ));
    let mut bars = vec![
        ("outbox".to_owned(), ours.median()),
        ("limit: overlapped".to_owned(), limit.median()),
        ("limit, deleted by ranges".to_owned(), ranged.median()),
    ];
    bars.extend(stages.iter().chain(&loops).map(|(n, r)| ((*n).to_owned(), r.median())));
    page.bars(
        &format!("drain-{engine}"),
        &Bars { title: format!("Drain, {engine}"), unit: "messages a second".to_owned(), bars },
    );
    let (skip, classic) =
        (ours.median() / loops[0].1.median(), ours.median() / loops[1].1.median());
    for (name, ratio) in [("", &ratio), (" that deletes by ranges", &ranged_ratio)] {
        page.verdict(
            format!("{engine}: outbox by the overlapped limit{name}"),
            ratio.show(share),
            ">= 0.90",
            ratio.median() >= 0.90,
        );
    }
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

/// Runs of ours and of limits, with what they used.
#[derive(Default)]
struct Sides {
    ours: Runs,
    our_cpu: Cpu,
    limits: Vec<(Runs, Cpu)>,
}

/// Ours and the limits in turn.
async fn sides(
    lab: &Lab,
    site: &Site,
    kafka: &Kafka,
    rows: usize,
    rounds: usize,
    limits: &[Stages],
) -> Result<Sides> {
    let mut sides = Sides::default();
    sides.limits.resize_with(limits.len(), Default::default);
    for round in 0..rounds {
        let limited = limits.iter().zip(&mut sides.limits).map(Some);
        let mut turns: Vec<_> = std::iter::once(None).chain(limited).collect();
        // Whoever comes first may find the machine in another state.
        let count = turns.len();
        turns.rotate_left(round % count);
        for turn in turns {
            let (name, runs, used, (time, cpu)) = match turn {
                None => {
                    let drained = filled(lab, site, kafka, rows).await?;
                    ("outbox", &mut sides.ours, &mut sides.our_cpu, drained)
                }
                Some((stages, (runs, used))) => {
                    let name = if stages.ranges { "limit by ranges" } else { "limit" };
                    (name, runs, used, overlapped(lab, site, kafka, rows, 1, *stages).await?)
                }
            };
            runs.push(per_second(rows, time));
            *used += cpu;
            lab.progress(format!("{}: {name} {}/s", site.engine, rate(per_second(rows, time))));
        }
    }
    Ok(sides)
}

/// Fills the outbox and drains it.
pub(super) async fn filled(
    lab: &Lab,
    site: &Site,
    kafka: &Kafka,
    rows: usize,
) -> Result<(Duration, Cpu)> {
    let topic = Topic::new(kafka, PARTITIONS).await?;
    site.fill(&topic.name, Backlog::of(rows)).await?;
    let drained = drain(lab, site, kafka, rows).await?;
    site.must_be_empty().await?;
    topic.delete().await?;
    Ok(drained)
}

/// Fills the outbox, and reads, produces and deletes its rows, as so many relays do.
pub(super) async fn overlapped(
    lab: &Lab,
    site: &Site,
    kafka: &Kafka,
    rows: usize,
    number: usize,
    stages: Stages,
) -> Result<(Duration, Cpu)> {
    let topic = Topic::new(kafka, PARTITIONS).await?;
    site.fill(&topic.name, Backlog::of(rows)).await?;
    let shares = Share::among(site, number, rows).await?;
    let before = lab.cpu(site.engine).await?;
    let count = async || lab.cpu(site.engine).await;
    let bootstrap = kafka.bootstrap();
    let (time, after) =
        raw::overlapped(site, bootstrap, &topic.name, &shares, DELETERS, stages, count).await?;
    site.must_be_empty().await?;
    topic.delete().await?;
    Ok((time, after - before))
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
    for _ in 0..lab.pick(1, 2) {
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
    for _ in 0..lab.pick(1, 2) {
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
