//! A producer that is created anew after a fatal error, and the thread that polls it.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use outbox_core::broker::PublishErrorKind;
use rdkafka::ClientConfig;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, Producer as _, PurgeConfig};
use tokio::sync::watch;

use crate::context::{Context, shielded};
use crate::partitions::Partitions;
use crate::secrets::{self, Secrets};

/// How long one poll waits for events. Bounds how late a stop is seen.
const POLL: Duration = Duration::from_millis(100);
/// A polling thread that did not come round for this long is taken for dead.
const POLL_DEAD: Duration = Duration::from_secs(3);
/// What a producer with a fatal error may still hear about messages in flight.
const LAST_ANSWERS: Duration = Duration::from_millis(500);
/// What ending the polling thread may take beyond the limit of `close`.
const END: Duration = Duration::from_secs(1);
/// The pause after the first fatal error; it doubles with every further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// A place for one producer at a time.
pub(crate) struct Slot {
    config: ClientConfig,
    partitions: Arc<Partitions>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    client: Option<Client>,
    failures: u32,
    not_before: Option<Instant>,
    closed: bool,
}

impl Slot {
    pub(crate) fn new(config: ClientConfig, partitions: &Arc<Partitions>) -> Self {
        Self { config, partitions: Arc::clone(partitions), state: Mutex::default() }
    }

    /// Creates the producer now instead of at the first use, to find mistakes in the settings.
    pub(crate) fn start(&self) -> Result<(), KafkaError> {
        self.lock().client = Some(self.client()?);
        Ok(())
    }

    /// The producer, created if there is none.
    ///
    /// # Errors
    ///
    /// `NotSent` after `close`; `Unavailable` while a producer may not be created yet, or cannot.
    pub(crate) fn producer(&self) -> Result<Arc<BaseProducer<Context>>, Refusal> {
        let mut state = self.lock();
        if state.closed {
            let code = RDKafkaErrorCode::BrokerDestroy;
            return Err(Refusal { kind: PublishErrorKind::NotSent, code });
        }
        if let Some(producer) = state.client.as_ref().and_then(Client::producer) {
            return Ok(producer);
        }
        state.retire();
        if state.not_before.is_some_and(|instant| Instant::now() < instant) {
            return Err(unavailable(RDKafkaErrorCode::Fatal));
        }
        match self.client() {
            Ok(client) => {
                tracing::info!("created a kafka producer");
                let producer = client.producer();
                state.client = Some(client);
                producer.ok_or_else(|| unavailable(RDKafkaErrorCode::Fatal))
            }
            Err(error) => {
                state.pause(false);
                Err(unavailable(error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail)))
            }
        }
    }

    /// Gives the producer up if its polling thread does not come round any more.
    pub(crate) fn retire_if_dead(&self) {
        let mut state = self.lock();
        if !state.client.as_ref().is_some_and(Client::seems_dead) {
            return;
        }
        state.client.as_ref().into_iter().for_each(Client::purge);
        state.retire();
        drop(state);
        // Last: what the thread is stuck in may be the log.
        tracing::error!("the polling thread of the kafka producer is stuck; it was abandoned");
    }

    /// Waits until nothing is queued or in flight, at most `within`; then purges the rest and
    /// ends the producer.
    pub(crate) async fn close(&self, within: Duration) {
        let client = {
            let mut state = self.lock();
            state.closed = true;
            state.client.take()
        };
        if let Some(client) = client {
            client.close(within).await;
        }
    }

    fn client(&self) -> Result<Client, KafkaError> {
        Client::start(&self.config, Arc::clone(&self.partitions))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn retire(&mut self) {
        if let Some(client) = self.client.take() {
            self.pause(client.life.acknowledged.load(Ordering::Relaxed));
        }
    }

    fn pause(&mut self, it_had_worked: bool) {
        self.failures = if it_had_worked { 1 } else { self.failures + 1 };
        self.not_before = Some(Instant::now() + pause(self.failures));
    }
}

/// The pause before a producer is created after `failures` in a row.
fn pause(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    (FIRST_PAUSE * 2_u32.pow(doublings)).min(LONGEST_PAUSE)
}

/// Why there is no producer; what was to be handed over is certainly not in the log.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Refusal {
    pub(crate) kind: PublishErrorKind,
    pub(crate) code: RDKafkaErrorCode,
}

fn unavailable(code: RDKafkaErrorCode) -> Refusal {
    Refusal { kind: PublishErrorKind::Unavailable, code }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `config_map` hides only the secrets that rdkafka knows of.
        let map = self.config.config_map();
        f.debug_map().entries(map.iter().map(|(k, v)| (*k, secrets::printable(k, v)))).finish()
    }
}

/// A running producer. Dropping it stops the polling thread, which then purges and ends the
/// producer: that blocks, so it never happens on the caller's thread.
struct Client {
    life: Arc<Life>,
}

/// What the polling thread shares with its client.
struct Life {
    /// `None` as soon as the producer ends, so that the polling thread becomes its last owner.
    producer: Mutex<Option<Arc<BaseProducer<Context>>>>,
    stopping: AtomicBool,
    fatal: AtomicBool,
    acknowledged: AtomicBool,
    born: Instant,
    /// Milliseconds from `born` to the last round of the polling thread.
    beat: AtomicU64,
    gone: watch::Sender<bool>,
}

impl Client {
    fn start(config: &ClientConfig, partitions: Arc<Partitions>) -> Result<Self, KafkaError> {
        let context = Context::new(Secrets::of(unredacted(config)), partitions);
        let producer = BaseProducer::from_config_and_context(config, context)?;
        let producer = Arc::new(producer);
        let life = Arc::new(Life {
            producer: Mutex::new(Some(Arc::clone(&producer))),
            stopping: AtomicBool::new(false),
            fatal: AtomicBool::new(false),
            acknowledged: AtomicBool::new(false),
            born: Instant::now(),
            beat: AtomicU64::new(0),
            gone: watch::Sender::new(false),
        });
        let thread = {
            let life = Arc::clone(&life);
            thread::Builder::new().name("outbox-kafka".to_owned()).spawn(move || life.run(producer))
        };
        match thread {
            Ok(_) => Ok(Self { life }),
            Err(error) => Err(KafkaError::ClientCreation(error.to_string())),
        }
    }

    /// The producer, unless it has ended or is about to.
    fn producer(&self) -> Option<Arc<BaseProducer<Context>>> {
        let fatal = self.life.fatal.load(Ordering::Acquire);
        if fatal { None } else { self.life.lock().clone() }
    }

    fn seems_dead(&self) -> bool {
        let beat = Duration::from_millis(self.life.beat.load(Ordering::Relaxed));
        self.life.born.elapsed().saturating_sub(beat) > POLL_DEAD
    }

    async fn close(self, within: Duration) {
        let flushed = async {
            while self.producer().is_some_and(|producer| producer.in_flight_count() > 0) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        // Of a time that is up, nothing is said: what is left is purged.
        let _ = tokio::time::timeout(within, flushed).await;
        let mut gone = self.life.gone.subscribe();
        self.life.stopping.store(true, Ordering::Release);
        if tokio::time::timeout(END, gone.wait_for(|gone| *gone)).await.is_err() {
            self.purge();
            tracing::warn!("the kafka producer has not ended yet; it goes on ending by itself");
        }
    }

    /// Has nothing more sent, where the polling thread, which should see to that, is stuck.
    fn purge(&self) {
        if let Some(producer) = self.life.lock().as_ref() {
            producer.purge(PurgeConfig::default().queue().inflight().non_blocking());
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.life.stopping.store(true, Ordering::Release);
    }
}

impl Life {
    /// The polling thread: reports are handled here until the producer ends.
    fn run(&self, producer: Arc<BaseProducer<Context>>) {
        let context = Arc::clone(producer.client().context());
        // The error callback is told the cause of a fatal error, not that it is one: ask.
        let mut fatal = None;
        while !self.stopping.load(Ordering::Acquire) && fatal.is_none() {
            self.poll(&producer, POLL);
            self.acknowledged.store(context.has_acknowledged(), Ordering::Relaxed);
            fatal = producer.client().fatal_error();
            if context.is_outdated() {
                let code = RDKafkaErrorCode::InvalidProducerEpoch;
                fatal = fatal.or_else(|| Some((code, String::new())));
            }
        }
        self.fatal.store(fatal.is_some(), Ordering::Release);
        self.lock().take();
        if let Some((cause, _)) = fatal {
            shielded(|| {
                tracing::error!(?cause, "the kafka producer had a fatal error and is replaced");
            });
            let deadline = Instant::now() + LAST_ANSWERS;
            while producer.in_flight_count() > 0 && Instant::now() < deadline {
                self.poll(&producer, Duration::from_millis(10));
            }
        }
        producer.purge(PurgeConfig::default().queue().inflight());
        self.end(producer);
        self.gone.send_replace(true);
    }

    /// Goes on polling while a publish still holds the producer, then drops it.
    fn end(&self, mut producer: Arc<BaseProducer<Context>>) {
        loop {
            self.poll(&producer, Duration::from_millis(10));
            match Arc::try_unwrap(producer) {
                Ok(last) => return drop(last),
                Err(shared) => producer = shared,
            }
        }
    }

    /// A panic that came through a callback ends this poll and nothing else.
    fn poll(&self, producer: &BaseProducer<Context>, wait: Duration) {
        self.beat.store(self.born.elapsed().as_millis() as u64, Ordering::Relaxed);
        shielded(|| producer.poll(wait));
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<BaseProducer<Context>>>> {
        self.producer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The properties with their values: `config_map` would already have replaced some of them.
fn unredacted(config: &ClientConfig) -> impl Iterator<Item = (&str, &str)> {
    config.config_map().into_keys().filter_map(|key| Some((key, config.get(key)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_doubles_up_to_a_minute() {
        let pauses: Vec<_> = (1..=4).map(|n| pause(n).as_millis()).collect();
        assert_eq!(pauses, [100, 200, 400, 800]);
        assert_eq!(pause(20), LONGEST_PAUSE);
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
    }
}
