//! Writers at full speed: what they lose to the relay beside them.

use std::{sync::Arc, time::Duration};

use anyhow::Result;
use integration_tests::{database::Engine, kafka::Kafka};
use outbox_core::Wake;
use outbox_kafka::KafkaBroker;

use super::drain::PARTITIONS;
use crate::{
    lab::Lab,
    plot::Lines,
    relay::Relay,
    report::Page,
    site::{Site, Topic},
    stats::{Runs, millis, rate, share},
    writers::{self, Latency, Ledger, Load, Waking, index_of},
};

/// The shortest poll interval, in ms; the first is the default.
const POLLS: [u64; 5] = [1, 5, 20, 50, 100];
const WRITERS: usize = 8;
/// More transactions than a server commits in that time.
const CAPACITY_PER_SECOND: usize = 20_000;

pub(crate) async fn run(lab: &Lab) -> Result<Page> {
    let mut page = Page::new("Writers at full speed");
    let time = lab.pick(Duration::from_secs(2), Duration::from_secs(8));
    page.say(format!(
        "{WRITERS} writers commit transactions of one business row and one message for {} s as \
         fast as they can, without a relay and beside one, in turns. All cores are busy, so what \
         the relay uses is lost to them. Before that, two turns beside a relay are not counted: the \
         first seconds of Kafka are those of its compiler. A longer shortest poll interval trades latency (from \
         the commit to the acknowledgement, in ms) for their speed.",
        time.as_secs()
    ));
    for engine in lab.engines() {
        of(lab, engine, time, &mut page).await?;
    }
    Ok(page)
}

async fn of(lab: &Lab, engine: Engine, time: Duration, page: &mut Page) -> Result<()> {
    let site = Site::new(lab, engine).await?;
    let kafka = lab.kafka().await?;
    page.say(format!("## {engine}"));
    let polls = lab.pick(&POLLS[..1], &POLLS[..]);
    let mut rows = vec![];
    let (mut p50, mut p99) = (vec![], vec![]);
    for _ in 0..2 {
        write(&site, kafka, time, Some(POLLS[0])).await?;
    }
    for poll in polls {
        let (mut alone, mut beside) = (Runs::default(), Runs::default());
        let mut latencies = vec![];
        let pairs = if *poll == POLLS[0] { lab.pick(1, 7) } else { 3 };
        for _ in 0..pairs {
            alone.push(write(&site, kafka, time, None).await?.0);
            let (reached, ledger) = write(&site, kafka, time, Some(*poll)).await?;
            beside.push(reached);
            latencies.extend(ledger);
        }
        let loss: Runs = beside.ratio(&alone);
        let loss = 1.0 - loss.median();
        let latency = Latency::of(&latencies);
        lab.progress(format!(
            "{engine}, poll {poll} ms: {}/s alone, {}/s beside, p99 {} ms",
            rate(alone.median()),
            rate(beside.median()),
            millis(latency.p99)
        ));
        rows.push([
            format!("{poll} ms"),
            alone.rate(),
            beside.rate(),
            percent(loss),
            millis(latency.p50),
            millis(latency.p99),
        ]);
        p50.push((100.0 * loss, latency.p50));
        p99.push((100.0 * loss, latency.p99));
        if *poll == POLLS[0] {
            page.verdict(
                format!("{engine}: what writers at full speed lose"),
                format!("{} (share left {})", percent(loss), beside.ratio(&alone).show(share)),
                "<= 15 %",
                loss <= 0.15,
            );
        }
    }
    page.table(
        ["shortest poll", "alone, tx/s", "beside the relay, tx/s", "loss", "p50", "p99"],
        &rows,
    );
    if rows.len() > 1 {
        for points in [&mut p50, &mut p99] {
            points.sort_by(|one, other| one.0.total_cmp(&other.0));
        }
        page.lines(
            &format!("flat-out-{engine}"),
            &Lines {
                title: format!("Latency by the writers' loss, {engine}"),
                x: "loss in per cent".to_owned(),
                y: "ms".to_owned(),
                series: vec![("p50".to_owned(), p50), ("p99".to_owned(), p99)],
            },
        );
    }
    Ok(())
}

fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

/// Gives the transactions a second, and the latencies if a relay ran.
async fn write(
    site: &Site,
    kafka: &Kafka,
    time: Duration,
    poll: Option<u64>,
) -> Result<(f64, Vec<f64>)> {
    writers::prepare(site).await?;
    let topic = Topic::new(kafka, PARTITIONS).await?;
    let ledger = Ledger::new(CAPACITY_PER_SECOND * time.as_secs() as usize);
    let relay = match poll {
        Some(poll) => {
            let ledger = Arc::clone(&ledger);
            let acknowledged = move |id, at| ledger.acknowledged(index_of(id), at);
            let broker = KafkaBroker::builder(kafka.bootstrap()).build()?;
            let (shortest, longest) = (Duration::from_millis(poll), Duration::from_millis(250));
            Some(Relay::start_timed(site, broker, acknowledged, |builder| {
                builder.poll(shortest, longest)
            })?)
        }
        None => None,
    };
    tokio::time::sleep(Duration::from_millis(500)).await;
    let load = Load { rate: None, time, writers: WRITERS, waking: Waking::None };
    let (written, took) =
        writers::write(site, &topic.name, &Wake::default(), load, &ledger).await?;
    if let Some(relay) = relay {
        ledger.all_acknowledged(written).await?;
        relay.stop().await?;
    }
    topic.delete().await?;
    Ok((written as f64 / took.as_secs_f64(), ledger.latencies(Duration::from_millis(1_500))))
}
