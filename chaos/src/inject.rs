//! Lets faults befall the parts, and heals them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use integration_tests::{
    Server,
    database::Engine,
    process::Signal,
    proxy::{Direction, Proxy},
};
use sqlx::AssertSqlSafe;
use tokio::time::{sleep, timeout};

use crate::{
    fault::{Client, Fault, Kind, Link, Part, links_to},
    stage::{RELAY, Stage, WRITER},
    topic,
};

/// Each piece is held back for up to so long.
const DELAY: Duration = Duration::from_millis(150);
const POLL: Duration = Duration::from_millis(10);
/// How long the database may take to change its mind about writes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Lets the fault begin once nobody else has what it strikes, and heals it. When it began and when
/// it was healed; `None` if there was nothing to strike, such as no COMMIT in its time.
///
/// # Errors
///
/// When a server does not come back: that is no fault that was asked for.
pub(crate) async fn inject(stage: &Stage, fault: Fault) -> Result<Option<(Instant, Instant)>> {
    let mut held = vec![];
    for hold in fault.kind.holds(stage.cast) {
        held.push(stage.holds[&hold].lock().await);
    }
    let began = Instant::now();
    let happened = befall(stage, fault).await.with_context(|| fault.to_string())?;
    Ok(happened.then(|| (began, Instant::now())))
}

async fn befall(stage: &Stage, Fault { kind, lasts }: Fault) -> Result<bool> {
    match kind {
        Kind::Kill(part) => {
            end(stage, part, Signal::SIGKILL).await?;
            sleep(lasts).await;
            start(stage, part).await?;
        }
        Kind::Terminate(part) => {
            end(stage, part, Signal::SIGTERM).await?;
            sleep(lasts).await;
            start(stage, part).await?;
        }
        Kind::Stop(part) => return stop(stage, part, lasts).await,
        Kind::SlowStart(part) => {
            end(stage, part, Signal::SIGKILL).await?;
            let links: Vec<_> = links_to(part, stage.cast);
            links.iter().for_each(|link| swallow(stage.link(*link)));
            start(stage, part).await?;
            sleep(lasts).await;
            links.iter().for_each(|link| stage.link(*link).heal());
        }
        Kind::Cut(link) => stage.link(link).cut(),
        Kind::Delay(link) => {
            for direction in [Direction::ToServer, Direction::ToClient] {
                stage.link(link).delay(direction, Duration::ZERO..=DELAY);
            }
            sleep(lasts).await;
            stage.link(link).heal();
        }
        Kind::BlackHole(link) => {
            swallow(stage.link(link));
            sleep(lasts).await;
            stage.link(link).heal();
        }
        Kind::Refuse(link) => {
            stage.link(link).refuse().await;
            stage.link(link).cut();
            sleep(lasts).await;
            stage.link(link).accept().await?;
        }
        Kind::CommitReplyLost => {
            let proxy = stage.link(Link::Writers);
            proxy.cut_reply_of(b"COMMIT");
            return Ok(happens(proxy, lasts).await);
        }
        Kind::CommitLost => {
            let proxy = stage.link(Link::Writers);
            proxy.cut_before(b"COMMIT");
            return Ok(happens(proxy, lasts).await);
        }
        Kind::SettleReplyLost(relay) => {
            let proxy = stage.link(Link::Relay(relay));
            proxy.cut_reply_of(b"DELETE o FROM outbox o FORCE");
            return Ok(happens(proxy, lasts).await);
        }
        Kind::ConnectionsKilled(client) => return kill_connections(stage, client).await,
        Kind::ReadOnly => {
            let refuses = set_read_only(stage, true).await;
            sleep(lasts).await;
            set_read_only(stage, false).await.context("the database stays read-only")?;
            return Ok(refuses.is_ok());
        }
        Kind::TopicDeleted => {
            topic::delete(&stage.cluster, &stage.beside).await?;
            sleep(lasts).await;
            stage.beside_was_created(topic::create(&stage.cluster, &stage.beside).await?);
        }
    }
    Ok(true)
}

async fn end(stage: &Stage, part: Part, signal: Signal) -> Result<()> {
    if let Some(program) = stage.program(part) {
        return match signal {
            Signal::SIGTERM => program.terminate().await,
            _ => program.kill().await,
        };
    }
    let server = server(stage, part)?;
    if signal == Signal::SIGTERM && server.stop().await.is_ok() {
        return Ok(());
    }
    // A broker does not end in order while too few others are there; nor would its operator wait.
    server.kill()
}

async fn start(stage: &Stage, part: Part) -> Result<()> {
    match stage.program(part) {
        Some(program) => program.start(),
        None => server(stage, part)?.start().await,
    }
}

/// Whether it was there to be stopped.
async fn stop(stage: &Stage, part: Part, lasts: Duration) -> Result<bool> {
    if let Some(program) = stage.program(part) {
        if program.signal(Signal::SIGSTOP).is_err() {
            return Ok(false);
        }
        sleep(lasts).await;
        program.signal(Signal::SIGCONT)?;
        return Ok(true);
    }
    let server = server(stage, part)?.clone();
    let stopped = server.clone();
    tokio::task::spawn_blocking(move || stopped.pause()).await??;
    sleep(lasts).await;
    server.resume()?;
    Ok(true)
}

fn server(stage: &Stage, part: Part) -> Result<&Server> {
    stage.server(part).with_context(|| format!("{part} is not there"))
}

fn swallow(proxy: &Proxy) {
    proxy.swallow(Direction::ToServer);
    proxy.swallow(Direction::ToClient);
}

/// Waits for a cut that happens once, and takes it back when it does not.
async fn happens(proxy: &Proxy, patience: Duration) -> bool {
    let before = proxy.happened();
    let deadline = Instant::now() + patience;
    while proxy.happened() == before && Instant::now() < deadline {
        sleep(POLL).await;
    }
    proxy.heal();
    proxy.happened() > before
}

/// Whether there was one.
async fn kill_connections(stage: &Stage, client: Client) -> Result<bool> {
    let user = match client {
        Client::Writers => WRITER,
        Client::Relays => RELAY,
    };
    let mut connection = stage.admin().await?;
    let list = format!(
        "SELECT CAST(id AS SIGNED) FROM information_schema.processlist WHERE user = '{user}'"
    );
    let deadline = Instant::now() + PATIENCE;
    let ids: Vec<i64> = loop {
        match sqlx::query_scalar(AssertSqlSafe(list.clone())).fetch_all(&mut connection).await {
            Ok(ids) => break ids,
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            // MySQL fails to show statements with bytes that are no text, while one runs.
            Err(_) => sleep(POLL).await,
        }
    };
    for id in &ids {
        // Some have ended meanwhile.
        let kill = AssertSqlSafe(format!("KILL {id}"));
        let _ = sqlx::raw_sql(kill).execute(&mut connection).await;
    }
    Ok(!ids.is_empty())
}

async fn set_read_only(stage: &Stage, refuses: bool) -> Result<()> {
    let statement = match (stage.database.engine(), refuses) {
        (Engine::MySql, true) => "SET GLOBAL super_read_only = 1",
        (Engine::MariaDb, true) => "SET GLOBAL read_only = 1",
        // With it goes MySQL's stronger one.
        (_, false) => "SET GLOBAL read_only = 0",
    };
    let mut connection = stage.admin().await?;
    timeout(PATIENCE, sqlx::raw_sql(statement).execute(&mut connection)).await??;
    Ok(())
}
