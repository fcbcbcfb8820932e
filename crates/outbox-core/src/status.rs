//! How a dispatcher is doing.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::store::Backlog;

/// How a dispatcher is doing; cheap to take.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Status {
    /// The one word for a health check.
    pub health: Health,
    /// Lanes held.
    pub lanes: usize,
    /// Published and not yet confirmed settled.
    pub in_flight: usize,
    /// Content of messages that is held in memory, in bytes: what was sent and not answered, and what
    /// is to be sent next.
    pub content_bytes: usize,
    /// Rows known, waiting ones included.
    pub known: usize,
    /// Keys whose first message is held, of the lanes held.
    pub held_keys: usize,
    /// Topics that are unknown or forbidden at the moment.
    pub closed_topics: Vec<Arc<str>>,
    /// What waits, as last counted.
    pub backlog: Option<Backlog>,
    /// How long ago a message was last acknowledged.
    pub last_delivery: Option<Duration>,
    /// What the dispatcher waits for, in words.
    pub detail: Option<String>,
    /// What the store found unsafe when it was opened, in words:
    /// [`StoreProfile::warnings`](crate::store::StoreProfile::warnings).
    pub warnings: Vec<String>,
}

/// The one word for a health check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Health {
    /// It has not opened its store yet.
    #[default]
    Starting,
    /// It has messages to deliver and delivers them.
    Working,
    /// Everything it may deliver is delivered.
    Idle,
    /// Other workers own all lanes.
    Standby,
    /// The broker is unavailable.
    BrokerDown {
        /// For how long.
        since: Duration,
    },
    /// The store is unavailable.
    StoreDown {
        /// For how long.
        since: Duration,
    },
    /// It has messages to deliver and has not delivered one for a lease.
    Stuck {
        /// For how long.
        since: Duration,
    },
    /// It is shutting down.
    Draining,
    /// It has stopped.
    Stopped,
}

impl Health {
    /// Whether a readiness probe should pass.
    pub fn is_ready(self) -> bool {
        matches!(self, Self::Working | Self::Idle | Self::Standby)
    }
}

/// In lower case, with whole seconds: `idle`, `broker down for 12 s`.
impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (words, since) = match self {
            Self::Starting => ("starting", None),
            Self::Working => ("working", None),
            Self::Idle => ("idle", None),
            Self::Standby => ("standby", None),
            Self::BrokerDown { since } => ("broker down", Some(since)),
            Self::StoreDown { since } => ("store down", Some(since)),
            Self::Stuck { since } => ("stuck", Some(since)),
            Self::Draining => ("draining", None),
            Self::Stopped => ("stopped", None),
        };
        match since {
            Some(since) => write!(f, "{words} for {} s", since.as_secs()),
            None => f.write_str(words),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_reads_as_words() {
        let since = Duration::from_millis(12_700);
        assert_eq!(Health::Idle.to_string(), "idle");
        assert_eq!(Health::BrokerDown { since }.to_string(), "broker down for 12 s");
        assert_eq!(Health::Stuck { since }.to_string(), "stuck for 12 s");
    }
}
