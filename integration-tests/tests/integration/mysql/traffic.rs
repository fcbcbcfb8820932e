//! Writers and dispatchers at work, and a check of what came of it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use anyhow::{bail, ensure};
use outbox_core::observe::{Event, Observer};
use outbox_core::{Dispatcher, MessageId};
use outbox_core::{RunError, Summary};
use outbox_testing::MemoryBroker;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

use super::*;

/// Longer than a lease, on a machine that does other things as well.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Each writer has so many aggregates of its own.
const AGGREGATES: usize = 10;

/// Dispatchers from one outbox to one broker in memory.
pub(super) struct Relays {
    pub(super) broker: MemoryBroker,
    /// How many lanes went without being given back.
    lost: Arc<AtomicUsize>,
    stop: Vec<oneshot::Sender<()>>,
    running: Vec<JoinHandle<Result<Summary, RunError>>>,
}

impl Relays {
    /// Starts dispatchers, each with connections of its own.
    pub(super) fn start(lab: &Lab, count: usize) -> Result<Self> {
        let broker = MemoryBroker::new();
        let lost = Lost::default();
        let counted = Arc::clone(&lost.0);
        let mut relays = Self { broker, lost: counted, stop: Vec::new(), running: Vec::new() };
        for _ in 0..count {
            let store = MySqlStore::with_idle_timeout(lab.url.parse()?, &lab.schema, TTL);
            let dispatcher = Dispatcher::builder(store, relays.broker.clone());
            let dispatcher = dispatcher.lease(TTL).observer(lost.clone()).build()?;
            let (stop, stopped) = oneshot::channel();
            relays.stop.push(stop);
            relays.running.push(tokio::spawn(dispatcher.run(async move {
                _ = stopped.await;
            })));
        }
        Ok(relays)
    }

    /// Waits until so many further messages have arrived.
    pub(super) async fn progress(&self, messages: usize) {
        self.broker.wait_for(self.broker.published().len() + messages).await;
    }

    pub(super) async fn stop(self) -> Result<MemoryBroker> {
        drop(self.stop);
        for running in self.running {
            running.await??;
        }
        Ok(self.broker)
    }
}

#[derive(Debug, Clone, Default)]
struct Lost(Arc<AtomicUsize>);

impl Observer for Lost {
    fn observe(&self, event: &Event) {
        if let Event::LanesLost { lanes } = event {
            self.0.fetch_add(lanes.len(), Relaxed);
        }
    }
}

/// Writers, at the isolation level that the server gives them.
pub(super) struct Writers {
    stop: Arc<AtomicBool>,
    running: JoinSet<Result<Written>>,
}

/// What writers committed.
#[derive(Default)]
pub(super) struct Written {
    /// In the order of the commits of each key.
    pub(super) messages: Vec<(String, MessageId)>,
    pub(super) rolled_back: HashSet<MessageId>,
    /// The longest time that a transaction took.
    pub(super) longest: Duration,
}

impl Writers {
    pub(super) async fn start(lab: &Lab, count: usize) -> Result<Self> {
        Self::start_with(lab, count, "DO 0").await
    }

    /// Starts writers that run a statement first.
    pub(super) async fn start_with(lab: &Lab, count: usize, first: &str) -> Result<Self> {
        let rows: Vec<_> = (0..count * AGGREGATES).map(|id| format!("({id}, 0)")).collect();
        let mut connection = lab.connect().await?;
        let table = "CREATE TABLE aggregate (id INT PRIMARY KEY, version BIGINT NOT NULL)";
        run(&mut connection, format!("{table}; INSERT INTO aggregate VALUES {}", rows.join(", ")))
            .await?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut running = JoinSet::new();
        for writer in 0..count {
            let mut connection = lab.connect().await?;
            run(&mut connection, first).await?;
            let (outbox, stop) = (lab.outbox.clone(), Arc::clone(&stop));
            running.spawn(async move {
                let mut written = Written::default();
                for number in 0.. {
                    if stop.load(Relaxed) {
                        break;
                    }
                    let aggregate = writer * AGGREGATES + number % AGGREGATES;
                    let commit = number % 20 != 7;
                    written.transact(&mut connection, &outbox, aggregate, commit).await?;
                }
                Ok(written)
            });
        }
        Ok(Self { stop, running })
    }

    pub(super) async fn stop(self) -> Result<Written> {
        self.stop.store(true, Relaxed);
        let mut all = Written::default();
        for one in self.running.join_all().await {
            let one = one.context("a writer")?;
            all.messages.extend(one.messages);
            all.rolled_back.extend(one.rolled_back);
            all.longest = all.longest.max(one.longest);
        }
        Ok(all)
    }
}

impl Written {
    async fn transact(
        &mut self,
        connection: &mut MySqlConnection,
        outbox: &MySqlOutbox,
        aggregate: usize,
        commit: bool,
    ) -> Result<()> {
        let start = Instant::now();
        let mut tx = connection.begin().await?;
        sqlx::query("UPDATE aggregate SET version = version + 1 WHERE id = ?")
            .bind(aggregate as u64)
            .execute(&mut *tx)
            .await?;
        let key = aggregate.to_string();
        let id = outbox.add(&mut tx, message(&key)).await?;
        if commit {
            tx.commit().await?;
            self.messages.push((key, id));
        } else {
            tx.rollback().await?;
            self.rolled_back.insert(id);
        }
        self.longest = self.longest.max(start.elapsed());
        Ok(())
    }

    /// Waits until the outbox is empty, then checks that every committed message arrived, once unless
    /// lanes were lost, no other one did, and each key's first appearances are in the order of the
    /// commits.
    pub(super) async fn judge(&self, lab: &Lab, relays: Relays) -> Result<()> {
        until_empty(lab).await?;
        let lost = Arc::clone(&relays.lost);
        let broker = relays.stop().await?;
        let lost = lost.load(Relaxed);
        let published = broker.published();
        let mut first: HashMap<MessageId, usize> = HashMap::new();
        for (at, record) in published.iter().enumerate() {
            first.entry(record.message_id).or_insert(at);
        }
        ensure!(!self.messages.is_empty() && !self.rolled_back.is_empty(), "nothing was written");
        let mut newest: HashMap<&str, usize> = HashMap::new();
        for (key, id) in &self.messages {
            let Some(at) = first.remove(id) else { bail!("message {id} is lost") };
            let before = newest.insert(key, at);
            ensure!(before < Some(at), "message {id} of key {key} appeared too early");
        }
        ensure!(first.is_empty(), "{} messages were never committed", first.len());
        let repetitions = published.len() - self.messages.len();
        println!(
            "{}: {} messages, {repetitions} repeated, {lost} lanes lost",
            lab.engine,
            self.messages.len()
        );
        ensure!(repetitions == 0 || lost > 0, "{repetitions} were repeated without a fault");
        Ok(())
    }
}

pub(super) async fn until_empty(lab: &Lab) -> Result<()> {
    let mut connection = lab.connect().await?;
    let start = Instant::now();
    while number(&mut connection, "SELECT COUNT(*) FROM outbox").await? > 0 {
        ensure!(start.elapsed() < PATIENCE, "the outbox is not empty after {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}
