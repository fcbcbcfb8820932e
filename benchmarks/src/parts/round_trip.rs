//! A broker far away, and a key that has most of the traffic.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use integration_tests::kafka::Kafka;
use outbox_kafka::KafkaBroker;
use rdkafka::producer::{FutureProducer, FutureRecord};

use super::drain::PARTITIONS;
use crate::{
    delay::Line,
    lab::{Lab, per_second},
    relay::Relay,
    report::Page,
    site::{Backlog, Site, Topic},
    stats::{Runs, millis, rate, share},
};

const PATIENCE: Duration = Duration::from_secs(600);
/// Of a hundred messages, so many are of the hot key.
const HOT: usize = 90;

pub(crate) async fn run(lab: &Lab) -> Result<Page> {
    let mut page = Page::new("Round trip to the broker, and a hot key");
    page.say(format!(
        "The answers of Kafka come later, by a line that delays every byte and holds as many as \
         come. The round trip is measured: the median time of a message that is produced alone, \
         over the same line (linger 0). Spread: a backlog over 10,000 keys. Hot: {HOT} % of the \
         backlog is one key, of which one message at a time may be outstanding, so that 1/round \
         trip is the most there can be. With a window of 64 messages a key they may overlap: \
         order then holds only while nothing fails. Messages a second; of the hot key alone where \
         there is one."
    ));
    let kafka = lab.proxied_kafka().await?;
    let node = kafka.nodes().first().context("a node")?.port();
    let node = SocketAddr::from(([127, 0, 0, 1], node));
    let proxy = kafka.proxies().first().context("a proxy")?;
    let mut rows = vec![];
    for engine in lab.engines() {
        let site = Site::new(lab, engine).await?;
        for &(delay, hot_rows) in
            lab.pick(&[(0, 5_000), (20, 50)][..], &[(0, 50_000), (5, 3_000), (20, 1_000)][..])
        {
            let line = Line::to(node, Duration::from_millis(delay)).await?;
            proxy.dial(line.address);
            proxy.cut();
            let alone = alone(kafka, lab.pick(50, 200)).await?;
            let spread = Backlog::of(lab.pick(10_000, 300_000));
            let hot = Backlog { hot: HOT, ..Backlog::of(hot_rows) };
            let spread = drain(&site, kafka, spread, 1, 1.0).await?;
            let mut gated = Runs::default();
            for _ in 0..lab.pick(1, 3) {
                gated.push(drain(&site, kafka, hot, 1, HOT as f64 / 100.0).await?);
            }
            let wide = drain(&site, kafka, hot, 64, HOT as f64 / 100.0).await?;
            let most = 1_000.0 / alone;
            let ratio = gated.median() / most;
            lab.progress(format!(
                "{engine}, {delay} ms: round trip {} ms, spread {}/s, hot {}/s ({} of 1/round trip)",
                millis(alone),
                rate(spread),
                rate(gated.median()),
                share(ratio)
            ));
            rows.push([
                engine.to_string(),
                format!("{delay} ms"),
                format!("{} ms", millis(alone)),
                rate(spread),
                gated.rate(),
                share(ratio),
                rate(wide),
            ]);
            if delay > 0 {
                page.verdict(
                    format!("{engine}: hot key at {delay} ms by 1/round trip"),
                    share(ratio),
                    ">= 0.90",
                    ratio >= 0.9,
                );
            }
        }
    }
    page.table(
        [
            "",
            "delay",
            "round trip",
            "spread",
            "hot, one at a time",
            "by 1/round trip",
            "hot, window of 64",
        ],
        &rows,
    );
    Ok(page)
}

/// The median time of a message alone, in ms.
async fn alone(kafka: &Kafka, times: usize) -> Result<f64> {
    let topic = Topic::new(kafka, PARTITIONS).await?;
    let producer: FutureProducer = kafka
        .client()
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("linger.ms", "0")
        .create()?;
    let payload = [b'p'; 1024];
    let mut took = Runs::default();
    for warm in [true, false] {
        for _ in 0..times {
            let began = Instant::now();
            let record = FutureRecord::to(&topic.name).key("hot").payload(&payload[..]);
            let sent = producer.send_result(record).map_err(|(error, _)| error)?;
            sent.await?.map_err(|(error, _)| error)?;
            if !warm {
                took.push(began.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    topic.delete().await?;
    Ok(took.median())
}

/// Drains it; gives the rate of the given share of the messages.
async fn drain(
    site: &Site,
    kafka: &Kafka,
    backlog: Backlog,
    window: usize,
    part: f64,
) -> Result<f64> {
    let topic = Topic::new(kafka, PARTITIONS).await?;
    site.fill(&topic.name, backlog).await?;
    let broker = KafkaBroker::builder(kafka.bootstrap()).build()?;
    let relay = Relay::start(site, broker, |builder| builder.in_key_window(window))?;
    // From the first settle on: a start is no part of a rate.
    let first = relay.settled(1, PATIENCE).await?;
    let done = relay.settled(backlog.rows, PATIENCE).await?;
    relay.stop().await?;
    site.must_be_empty().await?;
    topic.delete().await?;
    Ok(part * per_second(backlog.rows, done - first))
}
