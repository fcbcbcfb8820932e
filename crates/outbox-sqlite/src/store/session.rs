//! A connection of the relay: how it is set up.

use std::time::Duration;

use outbox_core::store::{StoreError, StoreErrorKind};
use sqlx::sqlite::{SqliteConnectOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, SqliteConnection};

use crate::error::store_error;
use crate::text::{self, run};

/// How long another writer is waited for: less than a statement's deadline under leases of 27 s and
/// more, so that SQLite gives the answer and not the deadline.
const BUSY_TIMEOUT: Duration = Duration::from_secs(3);

/// The application's options, with the settings that the relay relies on.
///
/// At NORMAL a commit waits for no disk while it keeps writers out, but for the first one into a log
/// that starts over, about every thousand pages; writers sync what they need with their own commits.
/// A power cut may take back the relay's last writes, which repeats deliveries and loses nothing.
pub(super) fn options(options: SqliteConnectOptions) -> SqliteConnectOptions {
    options
        .create_if_missing(false)
        .read_only(false)
        .immutable(false)
        .shared_cache(false)
        .busy_timeout(BUSY_TIMEOUT)
        .synchronous(SqliteSynchronous::Normal)
        .disable_statement_logging()
}

/// Connects and reads back what the relay relies on.
pub(super) async fn open(options: &SqliteConnectOptions) -> Result<SqliteConnection, StoreError> {
    let mut connection = options.connect().await.map_err(store_error)?;
    let packet = "PRAGMA journal_mode; PRAGMA encoding; PRAGMA busy_timeout".to_owned();
    let answers = run(&mut connection, packet).await?;
    let mut values = Vec::new();
    for row in answers.iter().flat_map(|answer| &answer.rows) {
        values.push(text::bytes(row, 0)?.unwrap_or_default());
    }
    let busy = BUSY_TIMEOUT.as_millis().to_string();
    verify(&values, &busy)?;
    Ok(connection)
}

/// Rollback journals would let a reader of the relay keep writers out; in UTF-16 the bytes of a
/// text are not those that were written.
fn verify(values: &[&[u8]], busy: &str) -> Result<(), StoreError> {
    let unsupported = |why: &'static str| Err(StoreError::new(StoreErrorKind::Unsupported, why));
    match values {
        [b"wal", b"UTF-8", timeout] if *timeout == busy.as_bytes() => Ok(()),
        [b"wal", b"UTF-8", _] => unsupported("session settings did not take effect"),
        [b"wal", ..] => unsupported("encoding is not UTF-8"),
        _ => unsupported("journal mode is not WAL"),
    }
}

/// The version of SQLite that runs here.
pub(super) async fn version(connection: &mut SqliteConnection) -> Result<String, StoreError> {
    let answers = run(connection, "SELECT sqlite_version()".to_owned()).await?;
    let version = answers.first().and_then(|answer| answer.rows.first());
    let version = version.map_or(Ok(None), |row| text::bytes(row, 0))?.unwrap_or_default();
    Ok(String::from_utf8_lossy(version).into_owned())
}

/// What there is to say about a version of SQLite: where two connections write and checkpoint at
/// once, older ones may damage the file (the WAL-reset bug). Two older lines are repaired as well.
pub(super) fn warning(version: &str) -> Option<String> {
    let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0_u32);
    let numbers = (next(), next(), next());
    let repaired = numbers >= (3, 51, 3) || matches!(numbers, (3, 50, 7..) | (3, 44, 6..));
    (!repaired).then(|| {
        format!("SQLite {version} can damage a database in WAL mode, rarely: use 3.51.3 or newer")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sqlite_that_may_damage_a_database_is_known() {
        for old in ["3.7.0", "3.44.5", "3.46.1", "3.49.2", "3.50.6", "3.51.2", "3.9.10", "", "?"] {
            assert!(warning(old).is_some_and(|warning| warning.contains(old)), "{old}");
        }
        for repaired in ["3.44.6", "3.50.7", "3.51.3", "3.51.10", "3.52.0", "3.100.0", "4.0.0"] {
            assert_eq!(warning(repaired), None, "{repaired}");
        }
    }

    #[test]
    fn a_session_is_read_back() {
        assert!(verify(&[b"wal", b"UTF-8", b"3000"], "3000").is_ok());
        for bad in [["delete", "UTF-8", "3000"], ["wal", "UTF-16le", "3000"], ["wal", "UTF-8", "0"]]
        {
            let error = verify(&bad.map(str::as_bytes), "3000").unwrap_err();
            assert_eq!(error.kind(), StoreErrorKind::Unsupported, "{bad:?}");
        }
    }
}
