//! What an error of sqlx or of SQLite means here.

use outbox_core::store::{StoreError, StoreErrorKind};

/// What SQLite said, by its extended result code: its texts may quote names of the application.
#[derive(Debug, thiserror::Error)]
#[error("SQLite error {code}")]
struct SqliteFailure {
    code: i32,
}

/// What the driver said, in words that hold no path and no data.
#[derive(Debug, thiserror::Error)]
enum DriverError {
    #[error("input or output failed: {0}")]
    Io(std::io::ErrorKind),
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
            let code = database.code().and_then(|code| code.parse().ok()).unwrap_or(0);
            return StoreError::new(kind_of(code, database.message()), SqliteFailure { code });
        }
        E::Io(io) => (StoreErrorKind::Unavailable, DriverError::Io(io.kind())),
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

/// What a result code means. Its lowest byte is the primary code, the rest a detail.
fn kind_of(code: i32, message: &str) -> StoreErrorKind {
    use StoreErrorKind as K;
    const SCHEMA: [&str; 3] = ["no such table", "no such column", "no such index"];
    match code & 0xff {
        // SQLITE_ERROR has no detail for what is missing.
        1 if SCHEMA.iter().any(|words| message.starts_with(words))
            || message.contains(" has no column named ") => K::Schema,
        5 | 6 // busy, locked: another connection writes
        => K::Conflict,
        7 // out of memory
        | 8 // read-only
        | 9 // interrupted
        | 10 // input or output
        | 13 // disk full
        | 14 // cannot open
        | 15 // locking protocol
        => K::Unavailable,
        3 | 23 // permission, authorizer
        => K::Denied,
        18..=20 // too big, constraint, type mismatch
        => K::Invalid,
        26 // not a database
        => K::Unsupported,
        _ => K::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_codes_map_to_kinds() {
        use StoreErrorKind as K;
        let table: [(K, &[i32]); 6] = [
            (K::Conflict, &[5, 6, 261, 517]),
            (K::Unavailable, &[8, 10, 13, 14, 266, 778]),
            (K::Denied, &[3, 23]),
            (K::Invalid, &[18, 19, 275, 2067]),
            (K::Unsupported, &[26]),
            (K::Other, &[0, 1, 11, 21]),
        ];
        for (kind, codes) in table {
            for code in codes {
                assert_eq!(kind_of(*code, ""), kind, "{code}");
            }
        }
        assert_eq!(kind_of(1, "no such table: outbox_meta"), K::Schema);
        assert_eq!(kind_of(1, "table outbox_lane has no column named lane"), K::Schema);
    }

    #[test]
    fn every_result_code_has_the_kind_that_was_decided_whatever_its_detail() {
        use StoreErrorKind as K;
        const DECIDED: [(K, &[i32]); 5] = [
            (K::Conflict, &[5, 6]),
            (K::Unavailable, &[7, 8, 9, 10, 13, 14, 15]),
            (K::Denied, &[3, 23]),
            (K::Invalid, &[18, 19, 20]),
            (K::Unsupported, &[26]),
        ];
        for code in 0..=u16::MAX.into() {
            let decided = DECIDED.iter().find(|(_, codes)| codes.contains(&(code & 0xff)));
            let expected = decided.map_or(K::Other, |(kind, _)| *kind);
            assert_eq!(kind_of(code, "words"), expected, "{code}");
            let missing = if code & 0xff == 1 { K::Schema } else { expected };
            assert_eq!(kind_of(code, "no such table: t"), missing, "{code}");
        }
        for code in [i32::MIN, -1, i32::MAX] {
            assert_eq!(kind_of(code, "words"), K::Other, "{code}");
        }
    }

    #[test]
    fn the_drivers_words_are_not_passed_on() {
        let words = "sqlite:///home/secret.db";
        for error in [
            sqlx::Error::Configuration(words.into()),
            sqlx::Error::Protocol(words.to_owned()),
            sqlx::Error::Io(std::io::Error::other(words)),
        ] {
            let error = store_error(error);
            let source = std::error::Error::source(&error).map(ToString::to_string);
            assert!(!format!("{error} {error:?} {source:?}").contains("secret"));
        }
    }
}
