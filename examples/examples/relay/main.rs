//! Teaches how to run the dispatcher as a process of its own, beside applications in any language.
//!
//! ```text
//! DATABASE_URL=mysql://relay:password@localhost/shop KAFKA_BOOTSTRAP=localhost:9092 \
//!     cargo run --example relay
//! ```
//!
//! It is configured by its environment alone. A variable that is empty counts as not set.
//!
//! | variable | without it | what it says |
//! |---|---|---|
//! | `DATABASE_URL` | refused | the MySQL or MariaDB with the outbox, `mysql://user:password@host/database` |
//! | `KAFKA_BOOTSTRAP` | refused | the cluster, `host:port`, several with commas between |
//! | `KAFKA_PROPERTY_..` | none | a property of librdkafka: `KAFKA_PROPERTY_SASL_USERNAME` sets `sasl.username`. Not those that the builder has methods for (`compression.type`, `linger.ms`, `client.id`, `message.max.bytes`, `partitioner`): it says so and ends. TLS and SCRAM need the feature `ssl` of outbox-kafka |
//! | `OUTBOX_HTTP` | `127.0.0.1:9464` | the address of `/health` and `/metrics` |
//! | `OUTBOX_TABLE_PREFIX` | none | the prefix of the tables, such as `shop_` |
//! | `OUTBOX_LEASE_SECONDS` | `45` | how long the lanes of a relay that died wait |
//! | `OUTBOX_MESSAGE_TIMEOUT_SECONDS` | `15` | how long Kafka may take for a message; the lease must outlast it |
//! | `OUTBOX_ROWS_IN_FLIGHT` | `20000` | the bound of what is published again after a crash |
//! | `OUTBOX_MAX_ATTEMPTS` | unlimited | after so many attempts that count a message dies: it is held, or skipped in `OUTBOX_SKIP_TOPICS` |
//! | `OUTBOX_TOPICS` | none | the topics that have figures of their own, with commas between; the rest is `other` |
//! | `OUTBOX_SKIP_TOPICS` | none | the topics whose dead messages go to the dead letters instead of holding their key |
//! | `RUST_LOG` | `info` | what is logged |
//!
//! - `GET /health` answers 200 while the relay delivers, has nothing to deliver, or stands by, and
//!   503 otherwise, with the reason. It is for alerts and for readiness. As a liveness probe it
//!   would do harm: a relay that waits for Kafka is not mended by a restart.
//! - `GET /metrics` is for Prometheus. Alert on `outbox_oldest_pending_age_seconds` first.
//! - SIGTERM and ctrl-c end it in order: what is in flight is waited for, the lanes are given back so
//!   that another relay takes them at once, and HTTP answers until then.
//! - It ends with 0 when it was asked to, with 1 when it cannot run (no tables, no rights, the address
//!   in use), with 2 when a variable is missing or illegal. A database or a cluster that is down ends
//!   nothing: it waits.
//!
//! The tables must be there: `migrations/mysql` holds their text.

mod http;
mod settings;

use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use mimalloc::MiMalloc;
use outbox_core::metrics::MetricsObserver;
use outbox_core::retry::{OnDeath, TopicPolicy};
use outbox_core::{Dispatcher, Summary};
use outbox_kafka::KafkaBroker;
use outbox_mysql::MySqlStore;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::settings::Settings;

/// The exit code when a variable is missing or illegal: starting again would not help.
const MISCONFIGURED: u8 = 2;

/// Twenty thousand messages under way are more than the caches of glibc's allocator are made for.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Bounds of the histograms in seconds, so that Prometheus can add up several relays.
const BUCKETS: [f64; 9] = [0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 600.0];

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();

    let settings = match Settings::of_the_environment() {
        Ok(settings) => settings,
        Err(mistakes) => {
            // All of them, so that one start tells all there is to put right.
            for mistake in mistakes {
                eprintln!("relay: {mistake}");
            }
            return ExitCode::from(MISCONFIGURED);
        }
    };
    let dispatcher = match dispatcher(&settings) {
        Ok(dispatcher) => dispatcher,
        Err(error) => {
            eprintln!("relay: {error:#}");
            return ExitCode::from(MISCONFIGURED);
        }
    };
    match run(dispatcher, settings.http).await {
        Ok(summary) => {
            println!("relay: stopped, {} delivered", summary.delivered);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("relay: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Checks what can be checked without a connection: what librdkafka and the dispatcher refuse.
fn dispatcher(settings: &Settings) -> Result<Dispatcher> {
    let mut broker =
        KafkaBroker::builder(&settings.kafka).message_timeout(settings.message_timeout);
    for (key, value) in &settings.kafka_properties {
        broker = broker.property(key, value);
    }
    let database = settings.database.clone();
    let store = MySqlStore::with_idle_timeout(database, &settings.schema, settings.lease);
    let mut dispatcher = Dispatcher::builder(store, broker.build()?)
        .lease(settings.lease)
        .retry(settings.retry)
        .rows_in_flight(settings.rows_in_flight)
        .observer(MetricsObserver::new(&settings.topics));
    for topic in &settings.skip_topics {
        dispatcher = dispatcher.topic(topic, TopicPolicy::new().on_death(OnDeath::Skip));
    }
    Ok(dispatcher.build()?)
}

async fn run(dispatcher: Dispatcher, address: SocketAddr) -> Result<Summary> {
    let asked_to_stop = asked_to_stop()?;
    let figures = PrometheusBuilder::new().set_buckets(&BUCKETS)?.install_recorder()?;
    tokio::spawn(upkeep(figures.clone()));
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    println!("relay: listening on http://{}", listener.local_addr()?);

    let router = http::router(dispatcher.handle(), figures);
    let dispatching = tokio::spawn(dispatcher.run(asked_to_stop));
    // HTTP goes last and needs no farewell: while the dispatcher drains, probes and scrapes are
    // answered, and cutting one of them off afterwards loses nothing.
    tokio::select! {
        summary = dispatching => Ok(summary??),
        served = axum::serve(listener, router).into_future() => {
            served?;
            bail!("HTTP ended")
        }
    }
}

/// Folds the samples of histograms, which would pile up while nobody scrapes.
async fn upkeep(figures: PrometheusHandle) {
    let mut every = tokio::time::interval(Duration::from_secs(5));
    loop {
        every.tick().await;
        figures.run_upkeep();
    }
}

fn asked_to_stop() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        println!("relay: stopping");
    })
}
