//! The names of our tables: the only text of a caller that ever becomes SQL.

use std::sync::Arc;

use outbox_core::store::{StoreError, StoreErrorKind};

/// All table names under one prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tables(Arc<Names>);

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Names {
    pub(crate) prefix: String,
    pub(crate) outbox: String,
    pub(crate) lane: String,
    pub(crate) worker: String,
    pub(crate) meta: String,
    pub(crate) held: String,
    pub(crate) dead: String,
    pub(crate) delivered: String,
    pub(crate) inbox: String,
}

impl Tables {
    /// The tables without a prefix.
    pub(crate) fn new() -> Self {
        Self::named("")
    }

    /// The tables whose names begin with `prefix`: `[A-Za-z_][A-Za-z0-9_]{0,31}`. Nothing else
    /// passes, because sqlx allows several statements in one text.
    pub(crate) fn with_prefix(prefix: &str) -> Result<Self, StoreError> {
        let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let valid = (1..=32).contains(&prefix.len())
            && prefix.bytes().all(word)
            && !prefix.as_bytes()[0].is_ascii_digit();
        let why = "table prefix is not a letter or _, then at most 31 letters, digits or _";
        if valid {
            Ok(Self::named(prefix))
        } else {
            Err(StoreError::new(StoreErrorKind::Invalid, why))
        }
    }

    fn named(prefix: &str) -> Self {
        Self(Arc::new(Names {
            prefix: prefix.to_owned(),
            outbox: format!("{prefix}outbox"),
            lane: format!("{prefix}outbox_lane"),
            worker: format!("{prefix}outbox_worker"),
            meta: format!("{prefix}outbox_meta"),
            held: format!("{prefix}outbox_held"),
            dead: format!("{prefix}outbox_dead"),
            delivered: format!("{prefix}outbox_delivered"),
            inbox: format!("{prefix}outbox_inbox"),
        }))
    }
}

impl std::ops::Deref for Tables {
    type Target = Names;

    fn deref(&self) -> &Names {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_plain_word_is_a_prefix() {
        for bad in ["", "1a", "a-b", "a b", "a;", "a`", "é", "a.b", &"x".repeat(33)] {
            let error = Tables::with_prefix(bad).unwrap_err();
            assert_eq!(error.kind(), StoreErrorKind::Invalid, "{bad:?}");
            let why = std::error::Error::source(&error).map(ToString::to_string);
            assert!(why.is_some_and(|why| why.starts_with("table prefix is not")), "{bad:?}");
        }
        for good in ["a", "_", "shop_", "A9_", &"x".repeat(32)] {
            assert_eq!(Tables::with_prefix(good).unwrap().outbox, format!("{good}outbox"));
        }
    }
}
