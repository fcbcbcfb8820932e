//! What an error of sqlx or of the server means here.

use outbox_core::store::{StoreError, StoreErrorKind};
use sqlx::mysql::MySqlDatabaseError;

/// What the server said, without its text: the texts of 1062, 1366 and others quote data.
#[derive(Debug, thiserror::Error)]
#[error("server error {number} ({state})")]
struct ServerError {
    number: u16,
    state: String,
}

/// What the driver said, in words that hold no address, no password and no data.
#[derive(Debug, thiserror::Error)]
enum DriverError {
    #[error("connection failed: {0}")]
    Io(std::io::ErrorKind),
    #[error("TLS failed")]
    Tls,
    #[error("connection options are invalid")]
    Configuration,
    #[error("answer could not be read")]
    Answer,
    #[error("driver failed")]
    Other,
}

/// The kind and the source of an error.
// By value, as `map_err` hands it over.
#[allow(clippy::needless_pass_by_value)]
pub(crate) fn store_error(error: sqlx::Error) -> StoreError {
    use sqlx::Error as E;
    let (kind, source) = match &error {
        E::Database(database) => {
            let Some(mysql) = database.try_downcast_ref::<MySqlDatabaseError>() else {
                return StoreError::new(StoreErrorKind::Other, DriverError::Other);
            };
            let state = mysql.code().unwrap_or_default().to_owned();
            let kind = kind_of(mysql.number(), &state);
            return StoreError::new(kind, ServerError { number: mysql.number(), state });
        }
        E::Io(io) => (StoreErrorKind::Unavailable, DriverError::Io(io.kind())),
        E::Tls(_) => (StoreErrorKind::Unavailable, DriverError::Tls),
        E::PoolTimedOut | E::PoolClosed | E::WorkerCrashed => {
            (StoreErrorKind::Unavailable, DriverError::Other)
        }
        E::Configuration(_) => (StoreErrorKind::Unsupported, DriverError::Configuration),
        E::Protocol(_) | E::ColumnDecode { .. } | E::Decode(_) | E::RowNotFound => {
            (StoreErrorKind::Other, DriverError::Answer)
        }
        _ => (StoreErrorKind::Other, DriverError::Other),
    };
    StoreError::new(kind, source)
}

/// What an error of a server means: its number where we know it, else the class of its SQLSTATE, of
/// which the standard defines three that say enough.
fn kind_of(number: u16, state: &str) -> StoreErrorKind {
    known(number).unwrap_or(match state.get(..2) {
        Some("08") => StoreErrorKind::Unavailable, // connection exception
        Some("28") => StoreErrorKind::Denied,      // invalid authorization
        Some("40") => StoreErrorKind::Conflict,    // transaction was rolled back
        _ => StoreErrorKind::Other,
    })
}

/// The numbers that we know. MySQL and MariaDB share most; those of one alone are named.
fn known(number: u16) -> Option<StoreErrorKind> {
    use StoreErrorKind as K;
    Some(match number {
        1213 // deadlock
        | 1205 // lock wait timeout; also NOWAIT on MariaDB
        | 1020 // record has changed since last read (MariaDB, innodb_snapshot_isolation)
        | 1180 // commit failed: certification on MariaDB Galera
        | 1614 // deadlock in an XA transaction
        | 3101 // rolled back by group replication
        | 3572 // NOWAIT (MySQL)
        => K::Conflict,
        1021 // disk full
        | 1040 | 1203 | 1226 // too many connections, of the server, the account, the hour
        | 1047 // WSREP has not prepared the node
        | 1053 | 1079 // shutting down
        | 1129 // host is blocked
        | 1152 | 1158 | 1159 | 1160 | 1161 | 1184 // connection aborted, packets in trouble
        | 1290 | 1792 | 1836 // read-only
        | 1317 // interrupted: KILL QUERY
        | 1927 // connection was killed (MariaDB)
        | 1969 | 3024 // statement timeout (MariaDB, MySQL)
        | 2006 | 2013 // gone away, lost
        | 3168 // server is not available (MySQL, still starting)
        | 4031 // disconnected for inactivity (MySQL)
        => K::Unavailable,
        1044 | 1045 | 1130 | 1142 | 1143 | 1227 | 1370 | 1698 // access denied, in part or whole
        | 1820 | 1862 | 3118 // password expired, account locked
        | 3159 // connection in the clear
        => K::Denied,
        1048 | 1264 | 1265 | 1292 | 1366 | 1406 // null, range, truncation, format, length
        | 1153 | 1301 // larger than max_allowed_packet
        | 3819 // CHECK (MySQL)
        | 4025 // CHECK (MariaDB)
        => K::Invalid,
        1046 // no database is selected
        | 1049 | 1054 | 1109 | 1146 // unknown database, column, table
        => K::Schema,
        1305 // the savepoint does not exist
        | 1690 // out of range: only the INSERT that `guarded_insert_sql` makes can be
        => K::NoTransaction,
        1064 | 1235 // syntax: a server that is too old
        | 1193 // unknown system variable
        | 1665 // binlog_format=STATEMENT bears no READ COMMITTED
        => K::Unsupported,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every number that means something to us. One that is added, or that moves to another kind,
    /// fails the test below; a human then decides.
    const DECIDED: &[(StoreErrorKind, &[u16])] = &[
        (StoreErrorKind::Conflict, &[1020, 1180, 1205, 1213, 1614, 3101, 3572]),
        (
            StoreErrorKind::Unavailable,
            &[
                1021, 1040, 1047, 1053, 1079, 1129, 1152, 1158, 1159, 1160, 1161, 1184, 1203, 1226,
                1290, 1317, 1792, 1836, 1927, 1969, 2006, 2013, 3024, 3168, 4031,
            ],
        ),
        (
            StoreErrorKind::Denied,
            &[1044, 1045, 1130, 1142, 1143, 1227, 1370, 1698, 1820, 1862, 3118, 3159],
        ),
        (StoreErrorKind::Invalid, &[1048, 1153, 1264, 1265, 1292, 1301, 1366, 1406, 3819, 4025]),
        (StoreErrorKind::Schema, &[1046, 1049, 1054, 1109, 1146]),
        (StoreErrorKind::NoTransaction, &[1305, 1690]),
        (StoreErrorKind::Unsupported, &[1064, 1193, 1235, 1665]),
    ];

    /// What an unknown number means under each class of SQLSTATE.
    fn of_class(class: &str) -> StoreErrorKind {
        match class {
            "08" => StoreErrorKind::Unavailable,
            "28" => StoreErrorKind::Denied,
            "40" => StoreErrorKind::Conflict,
            _ => StoreErrorKind::Other,
        }
    }

    #[test]
    fn every_error_number_under_every_class_of_state_has_the_kind_that_was_decided() {
        // All classes that either server uses, an empty state, and one cut within a character.
        let states = [
            "00000", "01000", "02000", "07001", "08S01", "0A000", "0K000", "0Z002", "20000",
            "21S01", "22001", "23000", "24000", "25001", "26000", "28000", "2F003", "33000",
            "3D000", "40001", "42000", "42S02", "44000", "45000", "70100", "HY000", "XA100", "",
            "4", "a\u{e9}",
        ];
        for number in 0..=u16::MAX {
            let decided = DECIDED.iter().find(|(_, numbers)| numbers.contains(&number));
            for state in states {
                let class = of_class(state.get(..2).unwrap_or_default());
                let expected = decided.map_or(class, |(kind, _)| *kind);
                assert_eq!(kind_of(number, state), expected, "{number} {state}");
            }
        }
    }

    #[test]
    fn a_broken_connection_is_unavailable() {
        let error = store_error(sqlx::Error::Io(std::io::ErrorKind::UnexpectedEof.into()));
        assert_eq!(error.kind(), StoreErrorKind::Unavailable);
    }

    #[test]
    fn the_drivers_words_are_not_passed_on() {
        let words = "mysql://user:secret@host";
        for error in [
            sqlx::Error::Configuration(words.into()),
            sqlx::Error::Protocol(words.to_owned()),
            sqlx::Error::Io(std::io::Error::other(words)),
            sqlx::Error::Tls(words.into()),
        ] {
            let error = store_error(error);
            let source = std::error::Error::source(&error).map(ToString::to_string);
            assert!(!format!("{error} {error:?} {source:?}").contains("secret"));
        }
    }
}
