//! Messages come at a steady rate: how long from the commit to the broker's acknowledgement.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::Result;
use integration_tests::{database::Engine, kafka::Kafka};
use outbox_core::Wake;
use outbox_kafka::KafkaBroker;
use rdkafka::{
    ClientConfig, ClientContext,
    message::DeliveryResult,
    producer::{BaseRecord, Producer, ProducerContext, ThreadedProducer},
};

use super::drain::PARTITIONS;
use crate::{
    lab::Lab,
    plot::Lines,
    relay::Relay,
    report::Page,
    site::{Site, Topic},
    stats::{millis, rate},
    writers::{self, Latency, Ledger, Load, Waking, index_of},
};

const RATES: [f64; 3] = [200.0, 1_000.0, 2_500.0];
/// How long there is traffic.
#[derive(Debug, Clone, Copy)]
struct Times {
    /// What a start costs (connections, lanes, the first metadata) is no part of a steady state, nor
    /// is the time until the relay reads as seldom as the load asks for.
    warm_up: Duration,
    measured: Duration,
}

impl Times {
    fn all(self) -> Duration {
        self.warm_up + self.measured
    }
}

pub(crate) async fn run(lab: &Lab) -> Result<Page> {
    let mut page = Page::new("Live");
    let [warm_up, measured] = lab.pick([1, 1], [4, 20]).map(Duration::from_secs);
    let times = Times { warm_up, measured };
    page.say(format!(
        "Eight writers commit transactions of one business row and one message of 1 KiB at a \
         steady rate for {} s, each at its time whether the one before was slow or not. Latency \
         is from the answer to the COMMIT to the acknowledgement as an observer of the relay \
         sees it, in ms. Beside it, a bare producer (linger 0) that sends the same messages at \
         the same rate to the same Kafka, without any database. `claims/s` is how often the \
         relay read, `pages/s` how often it found new rows: the poll interval is from one to the \
         next.",
        measured.as_secs()
    ));
    for engine in lab.engines() {
        of(lab, engine, times, &mut page).await?;
    }
    Ok(page)
}

async fn of(lab: &Lab, engine: Engine, times: Times, page: &mut Page) -> Result<()> {
    let site = Site::new(lab, engine).await?;
    let kafka = lab.kafka().await?;
    page.say(format!("## {engine}"));
    let mut rows = vec![];
    let mut series: Vec<(String, Vec<(f64, f64)>)> =
        Waking::ALL.iter().map(|waking| (format!("{}, p99", waking.name()), vec![])).collect();
    series.push(("plain produce, p99".to_owned(), vec![]));
    for per_second in lab.pick(&RATES[1..2], &RATES[..]).iter().copied() {
        let plain = plain(kafka, per_second, times).await?;
        rows.push(row(per_second, "plain produce", per_second, None, plain));
        series[3].1.push((per_second, plain.p99));
        for (index, waking) in Waking::ALL.into_iter().enumerate() {
            let seen = live(&site, kafka, per_second, times, waking).await?;
            let Seen { latency, claims, pages, achieved } = seen;
            lab.progress(format!(
                "{engine}, {per_second}/s, {}: p50 {} p99 {} ms; plain p99 {} ms",
                waking.name(),
                millis(latency.p50),
                millis(latency.p99),
                millis(plain.p99)
            ));
            rows.push(row(per_second, waking.name(), achieved, Some((claims, pages)), latency));
            series[index].1.push((per_second, latency.p99));
            if waking == Waking::None && per_second > 200.0 {
                let interval = 1_000.0 / pages;
                let limit = 3.0 * plain.p99 + interval;
                page.verdict(
                    format!("{engine}, {per_second}/s, {}: p99", waking.name()),
                    format!("{} ms", millis(latency.p99)),
                    format!("<= {} ms (3 x plain + one poll interval)", millis(limit)),
                    latency.p99 <= limit,
                );
            }
            if waking == Waking::Wake {
                page.verdict(
                    format!("{engine}, {per_second}/s, wake(): p50"),
                    format!("{} ms", millis(latency.p50)),
                    format!("<= {} ms (plain + 3 ms)", millis(plain.p50 + 3.0)),
                    latency.p50 <= plain.p50 + 3.0,
                );
            }
        }
    }
    let head = ["asked/s", "", "reached/s", "claims/s", "pages/s", "p50", "p95", "p99", "p99.9"];
    page.table(head, &rows);
    page.lines(
        &format!("live-{engine}"),
        &Lines {
            title: format!("Commit to acknowledgement, {engine}"),
            x: "transactions a second".to_owned(),
            y: "ms".to_owned(),
            series,
        },
    );
    Ok(())
}

fn row(
    asked: f64,
    name: &str,
    reached: f64,
    reads: Option<(f64, f64)>,
    latency: Latency,
) -> [String; 9] {
    let Latency { p50, p95, p99, p999 } = latency;
    let (claims, pages) =
        reads.map(|(claims, pages)| (rate(claims), rate(pages))).unwrap_or_default();
    let [p50, p95, p99, p999] = [p50, p95, p99, p999].map(millis);
    [rate(asked), name.to_owned(), rate(reached), claims, pages, p50, p95, p99, p999]
}

/// What a live run showed.
struct Seen {
    latency: Latency,
    claims: f64,
    pages: f64,
    achieved: f64,
}

async fn live(
    site: &Site,
    kafka: &Kafka,
    per_second: f64,
    times: Times,
    waking: Waking,
) -> Result<Seen> {
    writers::prepare(site).await?;
    let topic = Topic::new(kafka, PARTITIONS).await?;
    let ledger = Ledger::new((per_second * times.all().as_secs_f64()) as usize + 100);
    let wake = Wake::default();
    let broker = KafkaBroker::builder(kafka.bootstrap()).build()?;
    let relay = {
        let ledger = Arc::clone(&ledger);
        let acknowledged = move |id, at| ledger.acknowledged(index_of(id), at);
        let wake = wake.clone();
        Relay::start_timed(site, broker, acknowledged, |builder| builder.wake(wake))?
    };
    // Lanes are taken meanwhile.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let load = Load { rate: Some(per_second), time: times.all(), writers: 8, waking };
    let read = || [&relay.watched.claims, &relay.watched.pages].map(|count| count.load(Relaxed));
    let warm = async {
        tokio::time::sleep(times.warm_up).await;
        read()
    };
    let (written, before) =
        tokio::join!(writers::write(site, &topic.name, &wake, load, &ledger), warm);
    let (written, took) = written?;
    let after = read();
    let steady = (took - times.warm_up).as_secs_f64();
    let [claims, pages] = [0, 1].map(|n| (after[n] - before[n]) as f64 / steady);
    ledger.all_acknowledged(written).await?;
    relay.stop().await?;
    topic.delete().await?;
    // The ledger began before the writers did.
    let from = times.warm_up + Duration::from_millis(500);
    Ok(Seen {
        latency: Latency::of(&ledger.latencies(from)),
        claims,
        pages,
        achieved: written as f64 / took.as_secs_f64(),
    })
}

struct Acks(Arc<Ledger>);

impl ClientContext for Acks {}

impl ProducerContext for Acks {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, index: usize) {
        if result.is_ok() {
            self.0.acknowledged(index, Instant::now());
        }
    }
}

/// A bare producer at that rate.
async fn plain(kafka: &Kafka, per_second: f64, times: Times) -> Result<Latency> {
    let topic = Topic::new(kafka, PARTITIONS).await?;
    let count = (per_second * times.all().as_secs_f64()) as usize;
    let ledger = Ledger::new(count);
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", kafka.bootstrap())
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("partitioner", "murmur2_random")
        .set("linger.ms", "0");
    let producer: ThreadedProducer<Acks> = config.create_with_context(Acks(Arc::clone(&ledger)))?;
    let name = topic.name.clone();
    let producer = tokio::task::spawn_blocking(move || {
        producer.client().fetch_metadata(Some(&name), Duration::from_secs(10))?;
        let payload = [b'p'; 1024];
        let began = Instant::now();
        for index in 0..count {
            let due = began + Duration::from_secs_f64(index as f64 / per_second);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let key = format!("key-{}", index % 10_000);
            let mut record = BaseRecord::with_opaque_to(&name, index);
            record.key = Some(key.as_bytes());
            record.payload = Some(&payload[..]);
            ledger_time(&producer, index);
            producer.send(record).map_err(|(error, _)| error)?;
        }
        anyhow::Ok(producer)
    })
    .await??;
    ledger.all_acknowledged(count).await?;
    drop(producer);
    topic.delete().await?;
    Ok(Latency::of(&ledger.latencies(times.warm_up)))
}

/// For a message without a transaction, the send takes the place of the commit.
fn ledger_time(producer: &ThreadedProducer<Acks>, index: usize) {
    producer.client().context().0.committed(index, Instant::now());
}
