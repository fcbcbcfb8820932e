//! What the environment says, read and checked as a whole.

use std::collections::HashMap;
use std::env;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use outbox_core::retry::RetryPolicy;
use outbox_mysql::MySqlSchema;
use outbox_mysql::sqlx::mysql::MySqlConnectOptions;

const HTTP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9464);
// The defaults of the dispatcher and the broker, here to be printed in one table with the rest.
const LEASE: Duration = Duration::from_secs(45);
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(15);
const ROWS_IN_FLIGHT: usize = 20_000;

const PROPERTY: &str = "KAFKA_PROPERTY_";

/// The table at the top of `main.rs`, as values.
pub struct Settings {
    pub database: MySqlConnectOptions,
    pub kafka: String,
    pub kafka_properties: Vec<(String, String)>,
    pub http: SocketAddr,
    pub schema: MySqlSchema,
    pub lease: Duration,
    pub message_timeout: Duration,
    pub rows_in_flight: usize,
    pub retry: RetryPolicy,
    pub topics: Vec<String>,
    pub skip_topics: Vec<String>,
}

/// Never shows a value: URLs hold passwords.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum Mistake {
    #[error("{name} is not set: it must be {wanted}")]
    Missing { name: &'static str, wanted: &'static str },
    #[error("{name} is not {wanted}")]
    Illegal { name: &'static str, wanted: &'static str },
}

impl Settings {
    /// Reads the variables of this process.
    pub fn of_the_environment() -> Result<Self, Vec<Mistake>> {
        let text = |text: std::ffi::OsString| text.into_string().ok();
        Self::read(env::vars_os().filter_map(|(name, value)| Some((text(name)?, text(value)?))))
    }

    fn read(variables: impl IntoIterator<Item = (String, String)>) -> Result<Self, Vec<Mistake>> {
        let set = variables.into_iter().filter(|(_, value)| !value.is_empty());
        let mut reader = Reader { variables: set.collect(), mistakes: vec![] };
        let database = reader.required(
            "DATABASE_URL",
            "a URL like mysql://user:password@host/database",
            |text| text.starts_with("mysql://").then(|| text.parse().ok())?,
        );
        let kafka =
            reader.required("KAFKA_BOOTSTRAP", "a list like host:9092", |text| Some(text.into()));
        let http = reader.optional(
            "OUTBOX_HTTP",
            "an address like 0.0.0.0:9464",
            |text| text.parse().ok(),
            HTTP,
        );
        let schema = reader.optional(
            "OUTBOX_TABLE_PREFIX",
            "a letter or _, then at most 31 letters, digits or _",
            |text| MySqlSchema::new().with_prefix(text).ok(),
            MySqlSchema::new(),
        );
        let lease = reader.optional("OUTBOX_LEASE_SECONDS", SECONDS, seconds, LEASE);
        let message_timeout =
            reader.optional("OUTBOX_MESSAGE_TIMEOUT_SECONDS", SECONDS, seconds, MESSAGE_TIMEOUT);
        let rows_in_flight = reader.optional(
            "OUTBOX_ROWS_IN_FLIGHT",
            "a number of at least 1",
            |text| text.parse().ok().filter(|rows| *rows > 0),
            ROWS_IN_FLIGHT,
        );
        let retry = reader.optional(
            "OUTBOX_MAX_ATTEMPTS",
            "a number of at least 1",
            |text| {
                let attempts = text.parse().ok().filter(|attempts| *attempts > 0)?;
                Some(RetryPolicy::default().max_attempts(attempts))
            },
            RetryPolicy::default(),
        );
        let topics = reader.list("OUTBOX_TOPICS");
        let skip_topics = reader.list("OUTBOX_SKIP_TOPICS");
        let kafka_properties = reader.properties();
        match (database, kafka) {
            (Some(database), Some(kafka)) if reader.mistakes.is_empty() => Ok(Self {
                database,
                kafka,
                kafka_properties,
                http,
                schema,
                lease,
                message_timeout,
                rows_in_flight,
                retry,
                topics,
                skip_topics,
            }),
            _ => Err(reader.mistakes),
        }
    }
}

const SECONDS: &str = "a number of seconds like 45 or 1.5";

fn seconds(text: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(text.parse().ok()?).ok().filter(|time| !time.is_zero())
}

/// Reads on after a mistake, so that all are told.
struct Reader {
    variables: HashMap<String, String>,
    mistakes: Vec<Mistake>,
}

impl Reader {
    fn required<T>(
        &mut self,
        name: &'static str,
        wanted: &'static str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let Some(text) = self.variables.get(name) else {
            self.mistakes.push(Mistake::Missing { name, wanted });
            return None;
        };
        let value = read(text);
        if value.is_none() {
            self.mistakes.push(Mistake::Illegal { name, wanted });
        }
        value
    }

    fn optional<T>(
        &mut self,
        name: &'static str,
        wanted: &'static str,
        read: impl FnOnce(&str) -> Option<T>,
        without: T,
    ) -> T {
        if !self.variables.contains_key(name) {
            return without;
        }
        self.required(name, wanted, read).unwrap_or(without)
    }

    fn list(&self, name: &str) -> Vec<String> {
        let words = self.variables.get(name).map(String::as_str).unwrap_or_default().split(',');
        words.map(|word| word.trim().to_owned()).filter(|word| !word.is_empty()).collect()
    }

    fn properties(&self) -> Vec<(String, String)> {
        let named = self.variables.iter().filter_map(|(name, value)| {
            let key = name.strip_prefix(PROPERTY)?.to_lowercase().replace('_', ".");
            Some((key, value.clone()))
        });
        named.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Settings, Vec<Mistake>> {
        let owned = variables.iter().map(|(name, value)| ((*name).into(), (*value).into()));
        Settings::read(owned)
    }

    const URLS: [(&str, &str); 2] =
        [("DATABASE_URL", "mysql://relay:secret@db/shop"), ("KAFKA_BOOTSTRAP", "kafka:9092")];

    #[test]
    fn two_urls_are_enough_and_an_empty_variable_is_not_set() {
        let settings = read(&[URLS[0], URLS[1], ("OUTBOX_LEASE_SECONDS", "")]).ok().unwrap();
        assert_eq!((settings.lease, settings.http), (LEASE, HTTP));
        assert_eq!(settings.schema, MySqlSchema::new());
        assert_eq!(settings.retry, RetryPolicy::default());
    }

    #[tokio::test]
    async fn the_defaults_fit_together() {
        assert!(crate::dispatcher(&read(&URLS).ok().unwrap()).is_ok());
    }

    #[test]
    fn every_mistake_is_named_at_once_and_no_value_is_shown() {
        let wrong = [
            ("DATABASE_URL", "postgres://relay:secret@db/shop"),
            ("OUTBOX_HTTP", "secret"),
            ("OUTBOX_TABLE_PREFIX", "1; secret"),
            ("OUTBOX_LEASE_SECONDS", "-1"),
            ("OUTBOX_MESSAGE_TIMEOUT_SECONDS", "secret"),
            ("OUTBOX_ROWS_IN_FLIGHT", "0"),
            ("OUTBOX_MAX_ATTEMPTS", "0"),
        ];
        let mistakes = read(&wrong).err().unwrap();
        let told: Vec<_> = mistakes.iter().map(ToString::to_string).collect();
        for (name, _) in wrong.iter().chain([&URLS[1]]) {
            let times = told.iter().filter(|line| line.starts_with(&format!("{name} is not")));
            assert_eq!(times.count(), 1, "{name} in {told:?}");
        }
        assert_eq!(told.len(), wrong.len() + 1);
        assert!(!format!("{mistakes:?} {told:?}").contains("secret"));
    }

    #[test]
    fn lists_and_properties_are_taken_apart() {
        let more = [
            ("OUTBOX_TOPICS", "orders, payments,"),
            ("OUTBOX_SKIP_TOPICS", "audit"),
            ("KAFKA_PROPERTY_SASL_USERNAME", "relay"),
        ];
        let settings = read(&[URLS.as_slice(), more.as_slice()].concat()).ok().unwrap();
        assert_eq!(settings.topics, ["orders", "payments"]);
        assert_eq!(settings.skip_topics, ["audit"]);
        assert_eq!(settings.kafka_properties, [("sasl.username".into(), "relay".into())]);
    }

    #[test]
    fn a_maximum_of_attempts_is_taken_over() {
        let limited = read(&[URLS[0], URLS[1], ("OUTBOX_MAX_ATTEMPTS", "7")]).ok().unwrap();
        assert_eq!(limited.retry, RetryPolicy::default().max_attempts(7));
    }

    #[tokio::test]
    async fn a_lease_that_the_message_timeout_outlasts_is_refused() {
        let short = read(&[URLS[0], URLS[1], ("OUTBOX_LEASE_SECONDS", "10")]).ok().unwrap();
        assert!(crate::dispatcher(&short).is_err());
    }
}
