//! Why a broker could not be built.

use std::fmt;

/// A [`KafkaBroker`](crate::KafkaBroker) that cannot be built.
///
/// Names the property, never its value: values may be secrets.
#[derive(Debug)]
pub struct KafkaBuildError {
    kind: KafkaBuildErrorKind,
    key: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl KafkaBuildError {
    pub(crate) fn of_key(
        kind: KafkaBuildErrorKind,
        key: impl Into<String>,
        reason: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { kind, key: Some(key.into()), source: Some(reason.into()) }
    }

    pub(crate) fn client(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { kind: KafkaBuildErrorKind::Client, key: None, source: Some(source.into()) }
    }

    /// What is wrong.
    pub fn kind(&self) -> KafkaBuildErrorKind {
        self.kind
    }

    /// The property or setting that is wrong, if it is one.
    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }
}

impl fmt::Display for KafkaBuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.key {
            Some(key) => write!(f, "{}: `{key}`", self.kind),
            None => self.kind.fmt(f),
        }
    }
}

impl std::error::Error for KafkaBuildError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| &**source as _)
    }
}

/// What is wrong with the settings of a broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum KafkaBuildErrorKind {
    /// The property would break a promise of the outbox.
    #[error("property would break a promise of the outbox")]
    Refused,
    /// The property has a method of its own on the builder.
    #[error("property is set by a method of the builder")]
    Reserved,
    /// The value is out of range, or librdkafka does not know the property or refuses its value.
    #[error("setting is invalid")]
    Invalid,
    /// librdkafka could not create a client with these settings.
    #[error("kafka client cannot be created")]
    Client,
}
