//! How much memory a relay holds, in a process of its own.

use std::{
    env,
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use integration_tests::kafka::KafkaCluster;
use outbox_core::Dispatcher;
use outbox_kafka::KafkaBroker;
use outbox_mysql::{MySqlSchema, MySqlStore};

use super::drain::PARTITIONS;
use crate::{
    cpu::resident,
    lab::Lab,
    report::Page,
    site::{Backlog, Site, Topic, run as execute},
};

const PATIENCE: Duration = Duration::from_secs(600);
/// The default window of a relay.
const WINDOW: u64 = 64 << 20;
/// What the target allows on top of two windows.
const MARGIN: u64 = 64 << 20;
/// The first argument of the process that is only a relay.
pub(crate) const RELAY: &str = "relay-for-memory";

/// What that process does: relays until its input ends.
pub(crate) async fn relay(url: &str, bootstrap: &str) -> Result<()> {
    let store = MySqlStore::from_options(url.parse()?, &MySqlSchema::new());
    let broker = KafkaBroker::builder(bootstrap).build()?;
    let dispatcher = Dispatcher::builder(store, broker).build()?;
    let (stop, stopped) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut vec![]);
        let _ = stop.send(());
    });
    println!("ready");
    dispatcher
        .run(async {
            let _ = stopped.await;
        })
        .await?;
    Ok(())
}

/// When Kafka answers.
#[derive(Debug, Clone, Copy)]
enum Kafka {
    Always,
    /// It answers nothing for 1.8 of every 2.1 s.
    Halts,
    /// It answers nothing for 20 s, once.
    HaltsForLong,
}

impl Kafka {
    fn is_halted(self, since: Duration) -> bool {
        match self {
            Self::Always => false,
            Self::Halts => since.as_millis() % 2_100 >= 300,
            Self::HaltsForLong => (4..24).contains(&since.as_secs()),
        }
    }
}

/// What a relay works on.
struct Case {
    name: &'static str,
    backlog: Backlog,
    /// Whether the first message of the hot key is held.
    held: bool,
    answers: Kafka,
}

pub(crate) async fn run(lab: &Lab) -> Result<Page> {
    let mut page = Page::new("Memory");
    page.say(
        "Resident memory of a process that is only a relay with default settings (64 MiB of \
         content in flight), in MiB: idle, and the most while it works, sampled every 20 ms. A \
         Kafka that halts answers nothing for 1.8 of every 2.1 s.",
    );
    let mut rows = vec![];
    for engine in lab.engines() {
        let (site, kafka) = (Site::new(lab, engine).await?, lab.kafka().await?);
        for case in cases(lab) {
            let (idle, most) = measure(&site, kafka, &case, lab.pick(1, 3)).await?;
            let Case { name, backlog, .. } = case;
            let mib = |bytes: u64| format!("{:.0}", bytes as f64 / f64::from(1 << 20));
            lab.progress(format!(
                "{engine}, {name}: {} MiB idle, {} MiB at most",
                mib(idle),
                mib(most)
            ));
            let limit = idle + 2 * WINDOW + MARGIN;
            rows.push([
                engine.to_string(),
                backlog.rows.to_string(),
                name.to_owned(),
                mib(idle),
                mib(most),
                mib(most - idle),
            ]);
            page.verdict(
                format!("{engine}, {} messages of {name}: resident at most", backlog.rows),
                format!("{} MiB", mib(most)),
                format!("<= {} MiB (idle + 2 x window + 64 MiB)", mib(limit)),
                most <= limit,
            );
        }
    }
    page.table(["", "messages", "of", "idle", "most", "above idle"], &rows);
    Ok(page)
}

fn cases(lab: &Lab) -> [Case; 5] {
    let case = |name, backlog| Case { name, backlog, held: false, answers: Kafka::Always };
    let large = |rows| Backlog { payload: 900_000, ..Backlog::of(rows) };
    let hot = Backlog { hot: 50, ..Backlog::of(lab.pick(20_000, 200_000)) };
    [
        case("1 KiB", Backlog::of(lab.pick(50_000, 1_000_000))),
        case("900 kB", large(lab.pick(60, 1_500))),
        Case {
            answers: Kafka::Halts,
            ..case("900 kB, while Kafka halts", large(lab.pick(60, 500)))
        },
        Case {
            answers: Kafka::HaltsForLong,
            ..case("1 KiB, while Kafka halts for 20 s", Backlog::of(lab.pick(50_000, 1_000_000)))
        },
        Case { held: true, ..case("1 KiB, half of them behind a held key", hot) },
    ]
}

/// A child that ends with this value.
struct Relay(Child);

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The resident bytes of an idle relay, and the most while it drains the backlog.
async fn measure(
    site: &Site,
    kafka: &KafkaCluster,
    case: &Case,
    idle_seconds: u64,
) -> Result<(u64, u64)> {
    let &Case { backlog, held, answers, .. } = case;
    let topic = Topic::new(kafka, PARTITIONS).await?;
    let empty = Backlog { rows: 0, ..backlog };
    site.fill(&topic.name, empty).await?;
    let child = Command::new(env::current_exe()?)
        .args([RELAY, &site.relay_url, kafka.bootstrap()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut relay = Relay(child);
    let mut ready = String::new();
    BufReader::new(relay.0.stdout.take().context("its output")?).read_line(&mut ready)?;
    tokio::time::sleep(Duration::from_secs(idle_seconds)).await;
    let pid = relay.0.id();
    let idle = resident(pid)?.0;
    let mut expected = 0;
    if held {
        // The first message of the key is held before anything comes behind it.
        expected = backlog.rows * backlog.hot / 100;
        let mut connection = site.connect().await?;
        let hold = format!(
            "INSERT INTO outbox (id, message_id, topic, message_key, payload, held_at) \
             VALUES (1, REPEAT('h', 16), '{}', 'hot', 'held', UTC_TIMESTAMP(6)); \
             REPLACE INTO outbox_held (outbox_id, message_id, topic, message_key, held_at) \
             SELECT id, message_id, topic, message_key, held_at FROM outbox",
            topic.name
        );
        execute(&mut connection, &hold).await?;
        expected += 1;
    }
    // Filled while it works: the relay must cope with what comes as it comes.
    let name = topic.name.clone();
    let (filling, began) = (site.append(&name, backlog, usize::from(held)), Instant::now());
    let mut filled = false;
    let mut most = 0;
    tokio::pin!(filling);
    let mut halted = false;
    loop {
        let halt = answers.is_halted(began.elapsed());
        for node in kafka.nodes().iter().filter(|_| halt != halted) {
            if halt { node.pause()? } else { node.resume()? }
        }
        halted = halt;
        tokio::select! {
            done = &mut filling, if !filled => {
                done?;
                filled = true;
            }
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
        }
        most = most.max(resident(pid)?.0);
        if filled && began.elapsed().as_millis() % 10 == 0 && site.left().await? <= expected {
            break;
        }
        ensure!(began.elapsed() < PATIENCE, "the relay is not done after {PATIENCE:?}");
    }
    for node in kafka.nodes().iter().filter(|_| halted) {
        node.resume()?;
    }
    // In order: its lanes are free at once, and the next one need not wait for a lease.
    drop(relay.0.stdin.take());
    tokio::task::spawn_blocking(move || relay.0.wait()).await??;
    topic.delete().await?;
    Ok((idle, most))
}
