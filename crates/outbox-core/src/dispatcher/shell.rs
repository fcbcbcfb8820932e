//! Performs the machine's actions on store, broker and clock. No decisions here.

use std::collections::HashMap;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::Instrument;

use super::{RunError, Summary};
use crate::broker::{Broker, Outcomes, Outgoing, PublishErrorKind};
use crate::delivery::Delivery;
use crate::machine::{Action, Input, Machine, Settings, Time};
use crate::observe::{Event, Observer, Step};
use crate::status::{Health, Status};
use crate::store::{KeepLeases, Release, Store, StoreError, StoreErrorKind, StoreProfile};
use crate::wake::Wake;

/// How often the status is refreshed while there is work.
const STATUS_EVERY: Duration = Duration::from_millis(50);
/// A store may take this long to connect and to check its schema: there is no lease yet to be kept.
const SHORTEST_OPEN: Duration = Duration::from_secs(5);
/// A broker's check may take this long, however quickly it decides about messages.
const SHORTEST_CHECK: Duration = Duration::from_secs(1);
/// What a broker gets on top of its own limit before its publish is dropped.
const PUBLISH_SLACK: Duration = Duration::from_millis(500);

/// The machine's clock begins so late that the age of any row can be subtracted from it.
const BEFORE: Time = Duration::from_secs(50 * 366 * 24 * 3_600);

pub(super) struct Shell {
    pub(super) store: Arc<dyn Store>,
    pub(super) broker: Arc<dyn Broker>,
    pub(super) settings: Settings,
    pub(super) observers: Arc<[Box<dyn Observer>]>,
    pub(super) wake: Wake,
    pub(super) status: Arc<Mutex<Status>>,
}

impl Shell {
    pub(super) async fn run(self, shutdown: impl Future<Output = ()>) -> Result<Summary, RunError> {
        let _stopped = Stopped(&self);
        tokio::pin!(shutdown);
        let profile = tokio::select! {
            opened = self.open() => opened?,
            () = &mut shutdown => return Ok(Summary::default()),
        };
        for warning in &profile.warnings {
            tracing::warn!(warning, "the store warns");
        }
        let worker = self.settings.worker;
        tracing::info!(%worker, lanes = profile.lanes, "dispatcher started");
        let mut run = Run::new(&self, profile);
        let mut asked = false;
        loop {
            while let Some(action) = run.machine.poll(run.now()) {
                if matches!(action, Action::Stop) {
                    run.report(true);
                    tracing::info!(%worker, "dispatcher stopped");
                    return Ok(run.summary);
                }
                run.perform(action);
            }
            run.report(false);
            let wake_at = run.instant(run.machine.wake_at(run.now()));
            tokio::select! {
                biased;
                () = &mut shutdown, if !asked => {
                    asked = true;
                    run.handle(Input::ShutDown);
                }
                Some(input) = run.inputs.recv() => {
                    run.handle(input);
                    while let Ok(input) = run.inputs.try_recv() {
                        run.handle(input);
                    }
                }
                () = run.arrived.notified() => run.collect_answers(),
                urgency = self.wake.rung() => run.handle(Input::Rung(urgency)),
                () = sleep_until(wake_at) => {}
            }
            while run.tasks.try_join_next().is_some() {}
        }
    }

    /// Opens the store, and waits while it is down: a dispatcher that starts before its database
    /// is up must not end.
    async fn open(&self) -> Result<StoreProfile, StoreError> {
        let start = Instant::now();
        let mut wait = Duration::from_millis(200);
        let limit = self.settings.statement_deadline.max(SHORTEST_OPEN);
        loop {
            let error = match timeout(limit, self.store.open()).await {
                Ok(Ok(profile)) => return Ok(profile),
                Ok(Err(error)) => error,
                Err(_) => StoreError::from(StoreErrorKind::Unavailable),
            };
            let passes = matches!(
                error.kind(),
                StoreErrorKind::Unavailable | StoreErrorKind::Conflict | StoreErrorKind::Other
            );
            if !passes {
                return Err(error);
            }
            tracing::warn!(error = &error as &dyn std::error::Error, "store does not open yet");
            self.observe(&Event::StoreFailed { step: Step::Open, kind: error.kind() });
            self.status().health = Health::StoreDown { since: start.elapsed() };
            sleep(wait).await;
            wait = (wait * 2).min(Duration::from_secs(5));
        }
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn observe(&self, event: &Event) {
        for observer in self.observers.iter() {
            if catch_unwind(AssertUnwindSafe(|| observer.observe(event))).is_err() {
                tracing::error!("an observer panicked");
            }
        }
    }
}

/// However a run ends, dropped and panicked ones included, its status and its observers are told that
/// it holds nothing any more.
struct Stopped<'a>(&'a Shell);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        let mut status = self.0.status();
        status.health = Health::Stopped;
        (status.lanes, status.in_flight, status.content_bytes) = (0, 0, 0);
        (status.known, status.held_keys, status.backlog) = (0, 0, None);
        status.closed_topics.clear();
        (status.detail, status.last_delivery) = (None, None);
        drop(status);
        self.0.observe(&Event::Sampled { in_flight: 0, content_bytes: 0, lanes: 0 });
        self.0.observe(&Event::Stopped);
    }
}

/// One run of the dispatcher. Dropping it aborts every call that is out.
struct Run<'a> {
    shell: &'a Shell,
    machine: Machine,
    start: Instant,
    inputs: mpsc::UnboundedReceiver<Input>,
    sender: mpsc::UnboundedSender<Input>,
    timings: Arc<Mutex<Vec<(Step, Duration)>>>,
    tasks: JoinSet<()>,
    outcomes: HashMap<u64, Outcomes>,
    arrived: Arc<Notify>,
    summary: Summary,
    reported: Instant,
}

/// Answers for a call exactly once: with its result, or with a failure if the call panicked.
struct Answer {
    sender: mpsc::UnboundedSender<Input>,
    otherwise: Option<Input>,
}

impl Answer {
    fn give(mut self, input: Input) {
        self.otherwise = None;
        // Nobody listens any more once the run is over.
        let _ = self.sender.send(input);
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(input) = self.otherwise.take() {
            let _ = self.sender.send(input);
        }
    }
}

impl<'a> Run<'a> {
    fn new(shell: &'a Shell, profile: StoreProfile) -> Self {
        let (sender, inputs) = mpsc::unbounded_channel();
        let start = Instant::now();
        Self {
            machine: Machine::new(shell.settings.clone(), profile, BEFORE),
            shell,
            start,
            inputs,
            sender,
            timings: Arc::default(),
            tasks: JoinSet::new(),
            outcomes: HashMap::new(),
            arrived: Arc::default(),
            summary: Summary::default(),
            reported: start,
        }
    }

    fn now(&self) -> Time {
        BEFORE + self.start.elapsed()
    }

    fn instant(&self, time: Time) -> Instant {
        self.start + time.saturating_sub(BEFORE)
    }

    fn handle(&mut self, input: Input) {
        // Answers count even if the publish was cut short, or the broker closed: they come first.
        if matches!(input, Input::PublishEnded(_) | Input::Closed) {
            self.collect_answers();
        }
        if let Input::PublishEnded(batch) = input {
            self.outcomes.remove(&batch);
        }
        let now = self.now();
        self.machine.handle(input, now);
    }

    fn collect_answers(&mut self) {
        let now = self.now();
        for (batch, outcomes) in &self.outcomes {
            let answers = outcomes.take();
            if !answers.is_empty() {
                self.machine.handle(Input::Answered(*batch, answers), now);
            }
        }
    }

    fn perform(&mut self, action: Action) {
        let store = Arc::clone(&self.shell.store);
        let broker = Arc::clone(&self.shell.broker);
        let worker = self.shell.settings.worker;
        match action {
            Action::Keep(order) => {
                let ttl = self.shell.settings.lease;
                self.call(Step::Keep, Input::Kept, async move {
                    let request = KeepLeases::new(worker, ttl).healthy(order.healthy);
                    store.keep_leases(request.renew(&order.renew).take(&order.take)).await
                });
            }
            Action::Claim(order) => {
                self.call(
                    Step::Claim,
                    Input::Claimed,
                    async move { store.claim(order.request()).await },
                )
            }
            Action::Settle(number, order) => {
                let answer = move |result| Input::Settled(number, result);
                self.call(Step::Settle, answer, async move { store.settle(order.request()).await });
            }
            Action::Release(leases, leaving) => {
                self.call(Step::Release, Input::Released, async move {
                    let request = Release::new(worker, &leases);
                    store.release(if leaving { request.leaving() } else { request }).await
                });
            }
            Action::Purge(purge) => {
                self.call(Step::Purge, Input::Purged, async move { store.purge(purge).await });
            }
            Action::Count => {
                self.call(Step::Backlog, Input::Counted, async move { store.backlog().await });
            }
            Action::Publish(batch, deliveries) => self.publish(batch, deliveries),
            Action::Check => {
                let limit = self.shell.settings.undecided.max(SHORTEST_CHECK);
                let answer = self.answer(Input::Checked(Err(PublishErrorKind::Unavailable)));
                self.tasks.spawn(async move {
                    let checked = match timeout(limit, broker.check()).await {
                        Ok(Ok(())) => Ok(()),
                        Ok(Err(error)) => {
                            let source = &error as &dyn std::error::Error;
                            tracing::warn!(error = source, "the broker's check failed");
                            Err(error.kind())
                        }
                        Err(_) => {
                            tracing::warn!(?limit, "the broker did not answer a check in time");
                            Err(PublishErrorKind::Unavailable)
                        }
                    };
                    answer.give(Input::Checked(checked));
                });
            }
            Action::Close(within) => {
                let answer = self.answer(Input::Closed);
                self.tasks.spawn(async move {
                    // Closing purges what it cannot flush; it must end even if it does not.
                    let _ = timeout(within + PUBLISH_SLACK * 4, broker.close(within)).await;
                    answer.give(Input::Closed);
                });
            }
            Action::Stop => {}
        }
    }

    /// Calls the store within the statement deadline: what is overdue has failed, and its
    /// connection is closed because the call is dropped.
    fn call<T: 'static>(
        &mut self,
        step: Step,
        input: impl Fn(Result<T, StoreErrorKind>) -> Input + Send + 'static,
        call: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) {
        let limit = self.shell.settings.statement_deadline;
        let answer = self.answer(input(Err(StoreErrorKind::Other)));
        let timings = Arc::clone(&self.timings);
        let span = tracing::debug_span!("outbox", ?step);
        let task = async move {
            let start = Instant::now();
            let result = match timeout(limit, call).await {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(error)) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, ?step, "store failed");
                    Err(error.kind())
                }
                Err(_) => {
                    tracing::warn!(?step, ?limit, "store did not answer in time");
                    Err(StoreErrorKind::Unavailable)
                }
            };
            let mut timings = timings.lock().unwrap_or_else(PoisonError::into_inner);
            timings.push((step, start.elapsed()));
            drop(timings);
            answer.give(input(result));
        };
        self.tasks.spawn(task.instrument(span));
    }

    fn publish(&mut self, batch: u64, deliveries: Vec<(Box<Delivery>, Time)>) {
        let broker = Arc::clone(&self.shell.broker);
        let outcomes = Outcomes::new(deliveries.len(), Arc::clone(&self.arrived));
        self.outcomes.insert(batch, outcomes.clone());
        let outgoing: Vec<Outgoing> = deliveries
            .into_iter()
            .map(|(delivery, not_after)| Outgoing::new(delivery, self.instant(not_after)))
            .collect();
        let limit = self.shell.settings.undecided + PUBLISH_SLACK;
        let answer = self.answer(Input::PublishEnded(batch));
        let timings = Arc::clone(&self.timings);
        let span = tracing::debug_span!("outbox", step = "Publish", batch, rows = outgoing.len());
        let task = async move {
            let start = Instant::now();
            if timeout(limit, broker.publish(outgoing, &outcomes)).await.is_err() {
                let unanswered = outcomes.unanswered();
                tracing::warn!(unanswered, ?limit, "publish took too long and was dropped");
            }
            let mut timings = timings.lock().unwrap_or_else(PoisonError::into_inner);
            timings.push((Step::Publish, start.elapsed()));
            drop(timings);
            answer.give(Input::PublishEnded(batch));
        };
        self.tasks.spawn(task.instrument(span));
    }

    fn answer(&self, otherwise: Input) -> Answer {
        Answer { sender: self.sender.clone(), otherwise: Some(otherwise) }
    }

    fn report(&mut self, last: bool) {
        for event in self.machine.take_events() {
            self.count(&event);
            log(&event);
            self.shell.observe(&event);
        }
        let timings =
            std::mem::take(&mut *self.timings.lock().unwrap_or_else(PoisonError::into_inner));
        for (step, took) in timings {
            self.shell.observe(&Event::Timed { step, took });
        }
        if last || self.reported.elapsed() >= STATUS_EVERY {
            self.reported = Instant::now();
            let status = self.machine.status(self.now());
            let sampled = Event::Sampled {
                in_flight: status.in_flight,
                content_bytes: status.content_bytes,
                lanes: status.lanes,
            };
            *self.shell.status() = status;
            self.shell.observe(&sampled);
        }
    }

    fn count(&mut self, event: &Event) {
        match event {
            Event::Published { .. } => self.summary.delivered += 1,
            Event::RetryScheduled { .. } => self.summary.retried += 1,
            Event::Held { .. } => self.summary.held += 1,
            Event::Dead { .. } => self.summary.dead += 1,
            _ => {}
        }
    }
}

fn log(event: &Event) {
    match event {
        Event::Held { topic, id } => tracing::error!(%topic, %id, "message is held, its key waits"),
        Event::Dead { topic, id } => tracing::error!(%topic, %id, "message is dead"),
        Event::PublishFailed { topic, id, kind } => {
            tracing::debug!(%topic, %id, ?kind, "publish failed");
        }
        Event::RetryScheduled { topic, id, attempts, after } => {
            tracing::warn!(%topic, %id, attempts, ?after, "message failed and is tried again");
        }
        Event::LanesGained { lanes } => tracing::info!(?lanes, "lanes gained"),
        Event::LanesLost { lanes } => tracing::warn!(?lanes, "lanes lost"),
        Event::LanesReleased { lanes } => tracing::info!(?lanes, "lanes released"),
        Event::CircuitOpened => tracing::error!("broker is unavailable"),
        Event::CircuitClosed { after } => tracing::info!(?after, "broker is back"),
        Event::TopicClosed { topic } => tracing::error!(%topic, "topic is unknown or forbidden"),
        Event::TopicOpened { topic, after } => tracing::info!(%topic, ?after, "topic is back"),
        Event::ServerChanged => {
            tracing::warn!(
                "another database server or table answers, or one that was started again"
            )
        }
        Event::Full { rows } => {
            tracing::error!(rows, "too many rows wait, no further ones are read")
        }
        Event::Purged { rows } => tracing::debug!(rows, "purged"),
        _ => {}
    }
}
