//! Several relays on one outbox.

use std::{
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use async_trait::async_trait;
use integration_tests::database::Engine;
use outbox_core::broker::{
    Broker, BrokerProfile, Outcomes, Outgoing, PublishError, PublishErrorKind,
};
use outbox_kafka::KafkaBroker;
use sqlx::MySqlConnection;
use tokio::sync::watch;

use super::drain::{self, PARTITIONS, USUAL};
use crate::{
    cpu::Cpu,
    lab::{Lab, per_second},
    raw::Stages,
    relay::Relay,
    report::Page,
    site::{Backlog, Site, Topic},
    stats::{Runs, rate, share},
};

/// A backlog is older than the time for which a relay looks for rows that it never saw.
const GRACE: Duration = Duration::from_secs(12);
const PATIENCE: Duration = Duration::from_secs(600);

/// How a broker is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It cannot be used.
    Away,
    /// It takes messages, and works on them when it is back: relays probe it at different times.
    Returning,
    Back,
}

/// Longer than the time between two probes.
const RETURN: Duration = Duration::from_secs(6);

/// A broker that is away until it is let come back.
#[derive(Debug)]
struct Away {
    broker: KafkaBroker,
    state: watch::Receiver<State>,
}

#[async_trait]
impl Broker for Away {
    fn profile(&self) -> BrokerProfile {
        self.broker.profile()
    }

    async fn publish(&self, batch: Vec<Outgoing>, outcomes: &Outcomes) {
        if *self.state.borrow() == State::Away {
            let away = |index| outcomes.failed(index, PublishErrorKind::Unavailable.into());
            return (0..batch.len()).for_each(away);
        }
        // Nobody is left to let it come back only when the run is over.
        let _ = self.state.clone().wait_for(|state| *state == State::Back).await;
        self.broker.publish(batch, outcomes).await;
    }

    async fn check(&self) -> Result<(), PublishError> {
        self.broker.check().await
    }

    async fn close(&self, within: Duration) {
        self.broker.close(within).await;
    }
}

/// Runs of so many relays, with what they drained together and used for it.
#[derive(Debug, Clone, Default)]
struct Together {
    runs: Runs,
    messages: usize,
    used: Cpu,
}

impl Together {
    /// What the last run reached, and what all used.
    fn line(&self, engine: Engine, name: &str) -> String {
        let used = self.used.of_each(self.messages).join(" + ");
        format!("{engine}, {name}: {}/s, {used} µs", rate(self.runs.last()))
    }

    fn row(&self, engine: Engine, name: String, one: &Self, limit: &Self) -> [String; 9] {
        let by = |other: &Self| match other.messages {
            0 => String::new(),
            _ => self.runs.ratio(&other.runs).show(share),
        };
        let [database, kafka, relay, client] = self.used.of_each(self.messages);
        let engine = engine.to_string();
        [engine, name, self.runs.rate(), by(one), by(limit), database, kafka, relay, client]
    }
}

/// Whether relays know the backlog before they may publish it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begin {
    /// They run, share the lanes, and wait for the broker while the backlog grows old.
    Running,
    /// They start when the backlog is there.
    Started,
    /// The broker answers nothing meanwhile: they read on, and know most of it as ids only.
    Silence,
}

pub(crate) async fn run(lab: &Lab) -> Result<Page> {
    let count = lab.pick(200_000, 1_000_000);
    let mut page = Page::new("Several relays");
    page.say(format!(
        "One, two and four relays drain a backlog of {count} messages together (in one process, each \
         with connections, a producer and threads of its own). Messages a second of all together, \
         and processor time of each message in µs. Running: they share the lanes evenly while the \
         broker is away, the backlog grows and becomes older than the time for which they look for \
         rows that they never saw; the broker comes back, and from a fifth of the backlog on it is \
         measured. Started: they start when the backlog is there; from the moment at which they \
         share the lanes evenly on. For the first ten seconds a relay cannot know of rows that \
         another one has deleted that they are not to come yet, and asks for them again and again. \
         After a silence: as running, but the broker takes the first messages and answers nothing \
         until the backlog is there, most of which the relay then knows as ids only. The limit: so \
         many times the three stages of a relay (a read of the rows of its lanes, a produce of \
         them, a delete by ranges where ids follow each other and by lists where they do not) \
         overlapped with nothing in between, from the whole backlog on; in turn with the relays that \
         run."
    ));
    let mut rows = vec![];
    for engine in lab.engines() {
        let numbers = lab.pick(&[1, 2][..], &[1, 2, 4][..]);
        let (started, running) = ((Begin::Started, 1, numbers), (Begin::Running, 3, numbers));
        let silence = (Begin::Silence, 3, &[1][..]);
        for (begin, rounds, numbers) in lab.pick(&[started][..], &[running, started, silence]) {
            let mut measured = vec![Together::default(); numbers.len()];
            let mut limits = vec![Together::default(); numbers.len()];
            for _ in 0..*rounds {
                for ((number, all), limit) in numbers.iter().zip(&mut measured).zip(&mut limits) {
                    together(lab, engine, *begin, *number, count, all).await?;
                    lab.progress(all.line(engine, &format!("{number} {}", begin.name())));
                    if *begin == Begin::Running {
                        overlapped(lab, engine, *number, count, limit).await?;
                        lab.progress(limit.line(engine, &format!("limit of {number}")));
                    }
                }
            }
            if *begin == Begin::Running {
                for (number, limit) in numbers.iter().zip(&limits) {
                    let name = format!("the limit of {number}");
                    rows.push(limit.row(engine, name, &limits[0], limit));
                }
            }
            for ((number, all), limit) in numbers.iter().zip(&measured).zip(&limits) {
                let ratio = all.runs.ratio(&measured[0].runs);
                let name = format!("{number} {}", begin.name());
                rows.push(all.row(engine, name, &measured[0], limit));
                let target = match (number, begin) {
                    (2, Begin::Running) => 0.9,
                    (4, Begin::Running) => 0.8,
                    _ => continue,
                };
                page.verdict(
                    format!("{engine}: {number} relays together by one"),
                    ratio.show(share),
                    format!(">= {}", share(target)),
                    ratio.median() >= target,
                );
            }
        }
    }
    let columns = [
        "",
        "relays",
        "messages/s",
        "by one",
        "by the limit",
        "database",
        "Kafka",
        "relays",
        "librdkafka",
    ];
    page.table(columns, &rows);
    Ok(page)
}

impl Begin {
    fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Started => "started",
            Self::Silence => "after a silence",
        }
    }
}

async fn together(
    lab: &Lab,
    engine: Engine,
    begin: Begin,
    number: usize,
    count: usize,
    measured: &mut Together,
) -> Result<()> {
    let kafka = lab.kafka().await?;
    let topic = Topic::new(kafka, PARTITIONS).await?;
    let site = Site::new(lab, engine).await?;
    let first = match begin {
        Begin::Running => State::Away,
        Begin::Started => State::Back,
        Begin::Silence => State::Returning,
    };
    let (state, watched) = watch::channel(first);
    if begin == Begin::Started {
        site.fill(&topic.name, Backlog::of(count)).await?;
        tokio::time::sleep(lab.pick(Duration::from_secs(1), GRACE)).await;
    }
    let mut relays = vec![];
    for _ in 0..number {
        let broker = KafkaBroker::builder(kafka.bootstrap()).build()?;
        let broker = Away { broker, state: watched.clone() };
        relays.push(Relay::start(&site, broker, |builder| builder)?);
    }
    share_lanes(&site, number).await?;
    let all = || relays.iter().map(|relay| relay.watched.settled.load(Relaxed)).sum::<usize>();
    let reached = async |rows: usize| {
        let began = Instant::now();
        while all() < rows {
            ensure!(began.elapsed() < PATIENCE, "only {} of {count} were settled", all());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        anyhow::Ok(())
    };
    if begin != Begin::Started {
        site.append(&topic.name, Backlog::of(count), 0).await?;
        site.rest().await?;
        tokio::time::sleep(GRACE).await;
        if state.send_replace(State::Returning) == State::Away {
            tokio::time::sleep(RETURN).await;
        }
        state.send_replace(State::Back);
        reached(count / 5).await?;
    }
    let mut connection = site.connect().await?;
    const MOVED: &str = "lanes have moved: this is not what so many relays do together";
    ensure!(are_shared(&mut connection, number).await?, MOVED);
    let (began, cpu, before) = (Instant::now(), lab.cpu(engine).await?, all());
    ensure!(before < count / 10 * 8, "hardly anything is left to be drained together");
    reached(count).await?;
    let time = began.elapsed();
    measured.used += lab.cpu(engine).await? - cpu;
    ensure!(are_shared(&mut connection, number).await?, MOVED);
    measured.messages += count - before;
    measured.runs.push(per_second(count - before, time));
    for relay in relays {
        relay.stop().await?;
    }
    site.must_be_empty().await?;
    topic.delete().await
}

/// The stages of so many relays with nothing in between.
async fn overlapped(
    lab: &Lab,
    engine: Engine,
    number: usize,
    count: usize,
    measured: &mut Together,
) -> Result<()> {
    let site = Site::new(lab, engine).await?;
    let kafka = lab.kafka().await?;
    let stages = Stages { ranges: true, ..USUAL };
    let (time, used) = drain::overlapped(lab, &site, kafka, count, number, stages).await?;
    measured.used += used;
    measured.messages += count;
    measured.runs.push(per_second(count, time));
    Ok(())
}

/// Waits until so many relays share the lanes evenly.
async fn share_lanes(site: &Site, number: usize) -> Result<()> {
    let mut connection = site.connect().await?;
    let began = Instant::now();
    while !are_shared(&mut connection, number).await? {
        ensure!(began.elapsed() < Duration::from_secs(60), "the lanes are not shared evenly");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// Whether so many relays have all lanes, each as many.
async fn are_shared(connection: &mut MySqlConnection, number: usize) -> Result<bool> {
    let query = "SELECT COUNT(DISTINCT owner) * 1000 + COUNT(owner) FROM outbox_lane";
    let owned: usize = crate::site::first(connection, query).await?.parse()?;
    let query = "SELECT COALESCE(MAX(n) - MIN(n), -1) FROM (SELECT COUNT(*) n FROM outbox_lane \
                 WHERE owner IS NOT NULL GROUP BY owner) o";
    let uneven: String = crate::site::first(connection, query).await?;
    Ok(owned == number * 1_000 + 16 && uneven == "0")
}
