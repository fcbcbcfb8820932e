//! Our relay, observed from outside, in a runtime whose threads can be told from all others.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use outbox_core::{
    Broker, Dispatcher, DispatcherBuilder, MessageId,
    observe::{Event, Observer, Step},
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::oneshot,
    task::JoinHandle,
};

use crate::{cpu::RELAY_THREAD, site::Site};

/// A relay that runs until it is stopped.
pub(crate) struct Relay {
    runtime: Threads,
    stop: oneshot::Sender<()>,
    running: JoinHandle<Result<()>>,
    pub(crate) watched: Arc<Watched>,
    pub(crate) began: Instant,
}

/// What a relay told about its work.
#[derive(Default)]
pub(crate) struct Watched {
    pub(crate) published: AtomicUsize,
    pub(crate) settled: AtomicUsize,
    /// Rows settled so far, and when.
    pub(crate) settles: Mutex<Vec<(usize, Instant)>>,
    pub(crate) claims: AtomicUsize,
    /// Pages that brought rows.
    pub(crate) pages: AtomicUsize,
    acknowledged: Option<Box<Acknowledged>>,
}

type Acknowledged = dyn Fn(MessageId, Instant) + Send + Sync;

struct Watcher(Arc<Watched>);

impl Observer for Watcher {
    fn observe(&self, event: &Event) {
        let watched = &self.0;
        match event {
            Event::Published { id, .. } => {
                watched.published.fetch_add(1, Relaxed);
                if let Some(acknowledged) = &watched.acknowledged {
                    acknowledged(*id, Instant::now());
                }
            }
            Event::Settled { rows } => {
                let settled = watched.settled.fetch_add(*rows, Relaxed) + rows;
                let mut settles = watched.settles.lock().unwrap_or_else(PoisonError::into_inner);
                settles.push((settled, Instant::now()));
            }
            Event::Timed { step: Step::Claim, .. } => {
                watched.claims.fetch_add(1, Relaxed);
            }
            Event::Claimed { .. } => {
                watched.pages.fetch_add(1, Relaxed);
            }
            _ => {}
        }
    }
}

impl Relay {
    /// Starts one with the default settings, except for those that `change` sets.
    pub(crate) fn start(
        site: &Site,
        broker: impl Broker,
        change: impl FnOnce(DispatcherBuilder) -> DispatcherBuilder,
    ) -> Result<Self> {
        Self::start_watched(site, broker, Watched::default(), change)
    }

    /// The same; every acknowledgement is told with its time.
    pub(crate) fn start_timed(
        site: &Site,
        broker: impl Broker,
        acknowledged: impl Fn(MessageId, Instant) + Send + Sync + 'static,
        change: impl FnOnce(DispatcherBuilder) -> DispatcherBuilder,
    ) -> Result<Self> {
        let watched = Watched { acknowledged: Some(Box::new(acknowledged)), ..Watched::default() };
        Self::start_watched(site, broker, watched, change)
    }

    fn start_watched(
        site: &Site,
        broker: impl Broker,
        watched: Watched,
        change: impl FnOnce(DispatcherBuilder) -> DispatcherBuilder,
    ) -> Result<Self> {
        let watched = Arc::new(watched);
        let store = site.store()?;
        let runtime = runtime()?;
        let began = Instant::now();
        let builder = Dispatcher::builder(store, broker).observer(Watcher(Arc::clone(&watched)));
        let dispatcher = change(builder).build()?;
        let (stop, stopped) = oneshot::channel();
        let running = runtime.spawn(async move {
            let stopped = async {
                let _ = stopped.await;
            };
            dispatcher.run(stopped).await?;
            Ok(())
        });
        Ok(Self { runtime: Threads(Some(runtime)), stop, running, watched, began })
    }

    /// Waits until so many rows are settled, and tells when the last one was.
    pub(crate) async fn settled(&self, rows: usize, patience: Duration) -> Result<Instant> {
        while self.watched.settled.load(Relaxed) < rows {
            if self.running.is_finished() {
                bail!("the relay ended by itself");
            }
            if self.began.elapsed() > patience {
                let settled = self.watched.settled.load(Relaxed);
                bail!("only {settled} of {rows} rows were settled in {patience:?}");
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let settles = self.watched.settles.lock().unwrap_or_else(PoisonError::into_inner);
        let last = settles.iter().find(|(settled, _)| *settled >= rows);
        last.map(|(_, at)| *at).context("it was settled")
    }

    /// Stops it in order.
    pub(crate) async fn stop(self) -> Result<()> {
        let _ = self.stop.send(());
        self.running.await??;
        drop(self.runtime);
        Ok(())
    }
}

/// A runtime that may be dropped where another one waits, as it is when a part fails.
struct Threads(Option<Runtime>);

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// A runtime of threads that are counted as the relay's.
pub(crate) fn runtime() -> Result<Runtime> {
    Ok(Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name(RELAY_THREAD)
        .enable_all()
        .build()?)
}
