//! Relays: as processes, to be killed and paused, and as workers of this process, to be watched.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::process::{Process, Signal, was_ended_by};
use outbox_core::broker::PublishErrorKind;
use outbox_core::observe::{Event, Observer};
use outbox_core::{
    Broker, Dispatcher, DispatcherBuilder, DispatcherHandle, RunError, Store, Summary,
};
use outbox_kafka::{KafkaBroker, Security};
use outbox_mysql::{MySqlSchema, MySqlStore};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::{LEASE, PATIENCE, World};

/// As in `src/bin/relay.rs`: what a lease of 6 s leaves room for.
const MESSAGE_TIMEOUT: Duration = Duration::from_millis(1_500);

/// Bounds the duplicates of a fault; far below what is written between two of them.
pub(crate) const ROWS_IN_FLIGHT: usize = 100;

/// A relay in a process of its own.
pub(crate) struct Relay {
    pub(crate) process: Process,
    rows_in_flight: usize,
}

impl Relay {
    pub(crate) fn start(world: &World<'_>) -> Result<Self> {
        Self::start_with(world, ROWS_IN_FLIGHT)
    }

    /// Starts one with another window.
    pub(crate) fn start_with(world: &World<'_>, rows_in_flight: usize) -> Result<Self> {
        let rows = rows_in_flight.to_string();
        let variables = [
            ("DATABASE_URL", world.url.as_str()),
            ("KAFKA_BOOTSTRAP", world.kafka.bootstrap()),
            ("RELAY_ROWS_IN_FLIGHT", &rows),
        ];
        let process = Process::spawn(env!("CARGO_BIN_EXE_relay"), [""; 0], variables)?;
        Ok(Self { process, rows_in_flight })
    }

    /// Waits until it has lanes.
    pub(crate) async fn gains(&self) -> Result<()> {
        self.process.line_with("gained", PATIENCE).await?;
        Ok(())
    }

    pub(crate) async fn kill(&self) -> Result<()> {
        self.process.signal(Signal::SIGKILL)?;
        let status = self.process.end(PATIENCE).await?;
        ensure!(was_ended_by(status, Signal::SIGKILL), "{status}");
        Ok(())
    }

    /// Asks it to stop, and waits until it has.
    pub(crate) async fn stop(&self) -> Result<()> {
        self.process.signal(Signal::SIGTERM)?;
        let status = self.process.end(PATIENCE).await?;
        ensure!(status.success(), "a relay ended by {status}: {:?}", self.process.lines());
        Ok(())
    }

    /// How many lanes it has, by what it printed.
    pub(crate) fn lanes(&self) -> usize {
        self.process.lines().iter().fold(0, |lanes, line| {
            let mut words = line.split(' ');
            let word = words.next().unwrap_or_default();
            let count: usize = words.next().and_then(|count| count.parse().ok()).unwrap_or(0);
            match word {
                "gained" => lanes + count,
                "lost" | "released" => lanes.saturating_sub(count),
                _ => lanes,
            }
        })
    }

    /// How many duplicates so many faults of the path excuse, with what it suffered meanwhile.
    pub(crate) fn excused(&self, faults: usize) -> usize {
        self.rows_in_flight * (faults + self.count("lost"))
            + self.count("publish failed: outcome is unknown")
    }

    /// How many lines it printed that begin so.
    fn count(&self, beginning: &str) -> usize {
        self.process.lines().iter().filter(|line| line.starts_with(beginning)).count()
    }
}

/// A dispatcher in this process, and all that it told.
pub(crate) struct Worker {
    pub(crate) handle: DispatcherHandle,
    events: Events,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<Result<Summary, RunError>>,
}

impl Worker {
    /// Starts one on the world's database and cluster.
    pub(crate) fn start(world: &World<'_>) -> Result<Self> {
        Self::start_with(world, |builder| builder)
    }

    /// Starts one there, with further settings.
    pub(crate) fn start_with(
        world: &World<'_>,
        set: impl FnOnce(DispatcherBuilder) -> DispatcherBuilder,
    ) -> Result<Self> {
        let few = |builder: DispatcherBuilder| set(builder.rows_in_flight(ROWS_IN_FLIGHT));
        Self::run(store(&world.url)?, broker(world.kafka.bootstrap())?, few)
    }

    /// Starts one for a run without a fault, in which a busy machine must not look like one.
    pub(crate) fn patient(
        world: &World<'_>,
        set: impl FnOnce(DispatcherBuilder) -> DispatcherBuilder,
    ) -> Result<Self> {
        let broker = KafkaBroker::builder(world.kafka.bootstrap()).message_timeout(PATIENCE / 3);
        Self::run(store(&world.url)?, broker.build()?, |builder| set(builder.lease(PATIENCE)))
    }

    /// Starts one between that database and that cluster.
    pub(crate) fn between(url: &str, bootstrap: &str) -> Result<Self> {
        let few = |builder: DispatcherBuilder| builder.rows_in_flight(ROWS_IN_FLIGHT);
        Self::run(store(url)?, broker(bootstrap)?, few)
    }

    /// Starts one.
    pub(crate) fn run(
        store: impl Store,
        broker: impl Broker,
        set: impl FnOnce(DispatcherBuilder) -> DispatcherBuilder,
    ) -> Result<Self> {
        let events = Events::default();
        let builder = Dispatcher::builder(store, broker).lease(LEASE).observer(events.clone());
        let dispatcher = set(builder).build()?;
        let handle = dispatcher.handle();
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(dispatcher.run(async move {
            let _ = stopped.await;
        }));
        Ok(Self { handle, events, stop: Some(stop), running })
    }

    pub(crate) fn lanes(&self) -> usize {
        self.handle.status().lanes
    }

    /// How many of its events are of that kind.
    pub(crate) fn count(&self, is: impl Fn(&Event) -> bool) -> usize {
        self.events.all().iter().filter(|(_, event)| is(event)).count()
    }

    /// What `pick` takes of its events and their times.
    pub(crate) fn collect<T>(&self, pick: impl Fn(Instant, &Event) -> Option<T>) -> Vec<T> {
        self.events.all().iter().filter_map(|(time, event)| pick(*time, event)).collect()
    }

    /// How many messages the broker acknowledged.
    pub(crate) fn delivered(&self) -> usize {
        self.count(|event| matches!(event, Event::Published { .. }))
    }

    /// Answers of the broker that leave open what became of a message.
    pub(crate) fn ambiguous(&self) -> usize {
        let unknown = PublishErrorKind::Unknown;
        self.count(|event| matches!(event, Event::PublishFailed { kind, .. } if *kind == unknown))
    }

    /// How many duplicates so many faults of the path excuse, with what it suffered meanwhile.
    pub(crate) fn excused(&self, faults: usize) -> usize {
        let lost = self.count(|event| matches!(event, Event::LanesLost { .. }));
        ROWS_IN_FLIGHT * (faults + lost) + self.ambiguous()
    }

    /// Asks it to stop, and waits until it has.
    pub(crate) async fn stop(&mut self) -> Result<Summary> {
        drop(self.stop.take());
        Ok(tokio::time::timeout(PATIENCE, &mut self.running).await.context("a shutdown")???)
    }

    /// Ends it as a crash does: it gives nothing back.
    pub(crate) async fn crash(mut self) {
        self.running.abort();
        let _ = (&mut self.running).await;
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.running.abort();
    }
}

/// The relay's side of a database.
pub(crate) fn store(url: &str) -> Result<MySqlStore> {
    Ok(MySqlStore::with_idle_timeout(url.parse()?, &MySqlSchema::new(), LEASE))
}

/// The relay's side of a cluster.
pub(crate) fn broker(bootstrap: &str) -> Result<KafkaBroker> {
    broker_with(bootstrap, Security::plaintext())
}

/// The relay's side of a cluster that asks for this.
pub(crate) fn broker_with(bootstrap: &str, security: Security) -> Result<KafkaBroker> {
    let builder = KafkaBroker::builder(bootstrap).message_timeout(MESSAGE_TIMEOUT);
    Ok(builder.security(security).build()?)
}

/// Keeps the events that say what became of messages and lanes.
#[derive(Clone, Default)]
struct Events(Arc<Mutex<Vec<(Instant, Event)>>>);

impl Events {
    fn all(&self) -> MutexGuard<'_, Vec<(Instant, Event)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Events {
    fn observe(&self, event: &Event) {
        if !matches!(event, Event::Timed { .. } | Event::Sampled { .. } | Event::Claimed { .. }) {
            self.all().push((Instant::now(), event.clone()));
        }
    }
}
