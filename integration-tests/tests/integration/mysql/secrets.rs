//! The password of the database, and what applications write, are never shown: not by `Debug`, not
//! by an error, not in the log at its finest.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use integration_tests::database::Options;
use integration_tests::servers::Backend;
use outbox_core::dead_letters::DeadLetterQuery;
use outbox_core::delivery::{Failure, Settlement};
use outbox_core::message::Limits;
use outbox_core::store::{Failed, Settle, StoreErrorKind};
use outbox_core::{DeadLetters, Dispatcher};
use outbox_testing::MemoryBroker;

use super::*;

const PASSWORD: &str = "canary-password-81f2";
const CONTENT: [&str; 3] = ["canary-key-5f1c", "canary-payload-77ab", "canary-header-e09d"];

/// Everything that was shown to anybody.
#[derive(Clone, Default)]
struct Shown(Arc<Mutex<Vec<u8>>>);

impl Shown {
    fn show(&self, what: impl std::fmt::Debug) {
        writeln!(self.clone(), "{what:?} {what:#?}").expect("it is in memory");
    }

    /// Shows the error that must have come.
    #[track_caller]
    fn error<T, E: std::error::Error>(&self, result: Result<T, E>) {
        let error = result.err().expect("an error");
        let mut next: Option<&dyn std::error::Error> = Some(&error);
        while let Some(error) = next {
            writeln!(self.clone(), "{error} {error:?}").expect("it is in memory");
            next = error.source();
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

impl Write for Shown {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// As text, as the numbers of its bytes, in hexadecimal.
fn forms(canary: &str) -> [String; 3] {
    let numbers = format!("{:?}", canary.as_bytes());
    let hexadecimal = canary.bytes().map(|byte| format!("{byte:02x}")).collect();
    [canary.to_owned(), numbers.trim_matches(['[', ']']).to_owned(), hexadecimal]
}

fn canaries() -> Message {
    let [key, payload, header] = CONTENT;
    let builder = Message::builder("orders").key(key).payload(payload).header("auth", header);
    builder.build().expect("valid")
}

async fn a_relay_in_trouble_shows_no_password_and_no_content(engine: Engine) -> Result<()> {
    if Backend::Database(engine).is_left_out() {
        return Ok(());
    }
    let server = Database::private(engine, Options::fast()).await?;
    let lab = Lab::at(&server, MySqlSchema::new().with_lanes(4)?).await?;
    let mut root = lab.connect().await?;
    run(
        &mut root,
        format!(
            "CREATE USER relay IDENTIFIED BY '{PASSWORD}'; GRANT ALL ON *.* TO relay; \
             CREATE USER other IDENTIFIED BY 'other'"
        ),
    )
    .await?;
    let (_, place) = lab.url.split_once('@').context("an account in the URL")?;
    let url = format!("mysql://relay:{PASSWORD}@{place}");

    // From here on everything is watched.
    let shown = Shown::default();
    let writer = shown.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::level_filters::LevelFilter::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    let _log = tracing::subscriber::set_default(subscriber);

    let store = MySqlStore::connect(&url, &lab.schema).await?;
    shown.show((&store, &lab.schema, &lab.writer, &lab.outbox));
    let mut connection = MySqlConnection::connect(&url).await?;
    let outbox = lab.outbox.clone().with_limits(Limits::default().max_headers(2, 100_000));
    let mut tx = connection.begin().await?;
    outbox.add_all(&mut tx, vec![canaries(); 5]).await?;
    // More than the column holds: a CHECK refuses it, and the server names what it refuses.
    let [key, payload, header] = CONTENT;
    let long = header.repeat(4_000);
    let long = Message::builder("orders").key(key).payload(payload).header("auth", long).build()?;
    shown.error(outbox.add(&mut tx, long).await);
    tx.rollback().await?;
    shown.error(outbox.add(&mut connection, canaries()).await);
    let mut tx = connection.begin().await?;
    outbox.add(&mut tx, canaries()).await?;
    tx.commit().await?;

    let (_, lease) = lab.take(deliveries(lab.page().await?)[0].lane).await?;
    let row = deliveries(lab.page().await?).remove(0);
    shown.show(&row);
    let failure = Failure::new("rejected", "why");
    let failed = [Failed::new(id_of(&row), lease, row.state, 1, Settlement::Held, failure)];
    store.settle(Settle::new(&[], &failed)).await?;
    shown.show(DeadLetters::list(&store, &DeadLetterQuery::new()).await?);
    assert_eq!(DeadLetters::retry(&store, &[row.message.id()]).await?, 1);
    let dispatcher = Dispatcher::builder(store.clone(), MemoryBroker::new()).lease(TTL);
    shown.show(&dispatcher);

    // A wrong password, a database that is not there, tables that are not there.
    let wrong = format!("mysql://other:{PASSWORD}@{place}");
    shown.error(MySqlStore::connect(&wrong, &lab.schema).await);
    shown.error(MySqlStore::connect(&format!("{url}_missing"), &lab.schema).await);
    let elsewhere = MySqlSchema::new().with_prefix("none_")?;
    shown.error(MySqlStore::connect(&url, &elsewhere).await);
    let mut tx = connection.begin().await?;
    let missing = MySqlOutbox::new(MySqlWriter::new(&elsewhere));
    shown.error(missing.add(&mut tx, canaries()).await);
    tx.rollback().await?;
    // A row that somebody locks.
    run(&mut root, "BEGIN; SELECT id FROM outbox FOR UPDATE").await?;
    let row = deliveries(lab.page().await?).remove(0);
    let failure = Failure::new("rejected", "why");
    let failed = [Failed::new(id_of(&row), lease, row.state, 1, Settlement::Dead, failure)];
    let locked = store.settle(Settle::new(&[], &failed)).await;
    assert_eq!(locked.as_ref().map_err(|error| error.kind()).err(), Some(StoreErrorKind::Conflict));
    shown.error(locked);
    run(&mut root, "ROLLBACK").await?;
    // A server that takes no writes, and one that is gone.
    run(&mut root, "SET GLOBAL read_only = 1").await?;
    shown.error(MySqlStore::connect(&url, &lab.schema).await);
    run(&mut root, "SET GLOBAL read_only = 0").await?;
    store.open().await?;
    server.server().kill()?;
    shown.error(store.open().await);
    shown.error(MySqlStore::connect(&url, &lab.schema).await);
    shown.show(&store);

    let text = shown.text();
    for words in [
        &["INSERT INTO outbox"][..],
        &["server error 1045"],
        &["server error 1049"],
        &["server error 1146"],
        &["server error 1205"],
        &["server error 3819", "server error 4025"],
        &["server is read-only"],
        &["connection failed"],
    ] {
        let any = words.iter().any(|word| text.contains(word));
        assert!(any, "{words:?} was not exercised");
    }
    for canary in CONTENT.into_iter().chain([PASSWORD]) {
        for form in forms(canary) {
            let line = text.lines().find(|line| line.contains(&form));
            assert_eq!(line, None, "{canary} was shown");
        }
    }
    Ok(())
}

on_each! {
    a_relay_in_trouble_shows_no_password_and_no_content
}
