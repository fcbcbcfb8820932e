//! The key of a database, its place, and what an application writes, are never shown: not by
//! `Debug`, not by an error, not in the log. sqlx logs from threads of its own, so this program has
//! a subscriber for all threads.

use std::error::Error;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use outbox_core::dead_letters::DeadLetterQuery;
use outbox_core::delivery::{Failure, Lane, Lease, Position, RowId, Settlement, WorkerId};
use outbox_core::store::{
    Claim, Claimed, Failed, KeepLeases, Page, Settle, StoreErrorKind, TakeOver,
};
use outbox_core::{DeadLetters, Message, Store};
use outbox_sqlite::sqlx::sqlite::SqliteConnectOptions;
use outbox_sqlite::sqlx::{self, AssertSqlSafe, ConnectOptions, Connection};
use outbox_sqlite::{
    SqliteInbox, SqliteInsert, SqliteOutbox, SqliteSchema, SqliteStore, SqliteWriter,
};

const KEY: &str = "canary-key-of-the-database-81f2";
const PLACE: &str = "canary-place-30c4";
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
    fn error<T>(&self, result: Result<T, impl Error + 'static>) {
        let error = result.err().expect("an error");
        let mut next: Option<&dyn Error> = Some(&error);
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

fn message(topic: &str) -> Message {
    let [key, payload, header] = CONTENT;
    let builder = Message::builder(topic).key(key).payload(payload).header("auth", header);
    builder.build().expect("valid")
}

#[tokio::test]
async fn a_relay_in_trouble_shows_no_key_no_place_and_no_content() -> Result<()> {
    let folder = tempfile::Builder::new().prefix(PLACE).tempdir()?;
    let file = folder.path().join("shop.db");
    let application = SqliteConnectOptions::new().filename(&file).disable_statement_logging();
    let schema = SqliteSchema::new();
    let mut root = application.clone().create_if_missing(true).connect().await?;
    schema.migrate(&mut root).await?;
    // A rule of the application's own, whose text quotes what it refuses.
    let rule = format!(
        "CREATE TRIGGER rule BEFORE INSERT ON outbox WHEN NEW.topic = 'refused' \
         BEGIN SELECT RAISE(ABORT, '{}'); END",
        CONTENT.join(" ")
    );
    sqlx::raw_sql(AssertSqlSafe(rule)).execute(&mut root).await?;

    // From here on everything is watched.
    let shown = Shown::default();
    let writer = shown.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::level_filters::LevelFilter::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::set_global_default(subscriber)?;

    // A SQLite without encryption takes the key and does nothing with it.
    let options = SqliteConnectOptions::new().filename(&file).pragma("key", format!("'{KEY}'"));
    let store = SqliteStore::from_options(options, &schema);
    store.open().await?;
    let writer = SqliteWriter::new(&schema);
    let outbox = SqliteOutbox::new(writer.clone());
    shown.show((&store, &schema, &writer, &outbox, SqliteInbox::new(&schema, "billing")?));
    shown.show(SqliteInsert::new(&schema, &[message("orders")]));
    shown.show(SqliteInsert::new(&schema, &[message("orders")]).values());

    // The application logs its statements, which hold no values.
    let mut connection = SqliteConnectOptions::new().filename(&file).connect().await?;
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    outbox.add_all(&mut tx, vec![message("orders"); 5]).await?;
    shown.error(outbox.add(&mut tx, message("refused")).await);
    tx.rollback().await?;
    shown.error(outbox.add(&mut connection, message("orders")).await);
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    outbox.add(&mut tx, message("orders")).await?;
    tx.commit().await?;

    let me = KeepLeases::new(WorkerId::generate(), Duration::from_secs(60));
    let take: Vec<_> = store.keep_leases(me).await?.lanes.iter().map(TakeOver::of).collect();
    let lane = store.keep_leases(me.take(&take)).await?.lanes[0].clone();
    let page = Page::new(&[Lane(0)], Position::START, 10);
    let claimed = store.claim(Claim::new(1 << 20).page(page)).await?;
    shown.show(&claimed);
    let Claimed::Delivery(row) = &claimed.rows[0] else { panic!("a message") };
    let id = RowId::new(row.position, row.message.id());
    let lease = Lease::new(lane.lane, lane.epoch);
    let why = Failure::new("rejected", "why");
    let failed = [Failed::new(id, lease, row.state, 1, Settlement::Held, why)];
    store.settle(Settle::new(&[], &failed)).await?;
    shown.show(DeadLetters::list(&store, &DeadLetterQuery::new()).await?);

    // Another one writes: the relay waits and gives up.
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut root).await?;
    let busy = DeadLetters::retry(&store, &[row.message.id()]).await;
    assert_eq!(busy.as_ref().map_err(|error| error.kind()).err(), Some(StoreErrorKind::Conflict));
    shown.error(busy);
    sqlx::raw_sql("ROLLBACK").execute(&mut root).await?;
    assert_eq!(DeadLetters::retry(&store, &[row.message.id()]).await?, 1);
    // Tables that are not there, a file that is not there, and a URL that is none.
    let elsewhere = SqliteSchema::new().with_prefix("none_")?;
    shown.error(SqliteStore::from_options(application.clone(), &elsewhere).open().await);
    let missing = SqliteConnectOptions::new().filename(folder.path().join("none.db"));
    shown.error(
        SqliteStore::from_options(missing.pragma("key", format!("'{KEY}'")), &schema).open().await,
    );
    let url = format!("sqlite:{PLACE}/shop.db?mode={KEY}");
    shown.error(SqliteStore::connect(&url, &schema).await);

    let text = shown.text();
    for word in [
        "INSERT INTO outbox",
        "SQLite error 5",
        "SQLite error 14",
        "SQLite error 1811",
        "connection options are invalid",
    ] {
        assert!(text.contains(word), "{word:?} was not exercised: {text}");
    }
    for canary in CONTENT.into_iter().chain([KEY, PLACE]) {
        for form in forms(canary) {
            let line = text.lines().find(|line| line.contains(&form));
            assert_eq!(line, None, "{canary} was shown");
        }
    }
    Ok(())
}
