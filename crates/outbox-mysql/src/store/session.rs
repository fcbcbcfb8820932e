//! A connection of the relay: how it is set up, and what it learnt of its server.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use outbox_core::store::{StoreError, StoreErrorKind};
use sqlx::mysql::MySqlConnectOptions;
use sqlx::{ConnectOptions, MySqlConnection};

use super::exposure::is_exposed;
use crate::error::store_error;
use crate::text::{self, run};

/// How long a lock of somebody else is waited for, be it of rows or, beside an `ALTER TABLE`, of a
/// table. The defaults, of 50 s and of a day or a year, would outlast a lease: and who waits for a table
/// goes on waiting when the relay has given the call up, one connection more for each that it repeats.
const LOCK_WAIT_SECONDS: u64 = 3;

/// What the relay's statements are written for, whatever the server's default is: in MariaDB's mode
/// `ORACLE` a `BEGIN` is no start of a transaction.
const SQL_MODE: &str = "STRICT_TRANS_TABLES,NO_ENGINE_SUBSTITUTION";

/// The longest packets of the relay, claims of thousands of positions, stay below.
const LEAST_PACKET: u64 = 1 << 20;

/// A clock that differs more than this from ours is worth a warning.
const SKEW: Duration = Duration::from_secs(5);

/// The longest time that a server keeps a silent connection; it would cut a longer one short.
const LONGEST_IDLE: Duration = Duration::from_secs(365 * 24 * 3_600);

/// What a session needs to know.
#[derive(Clone)]
pub(super) struct Settings {
    pub(super) options: MySqlConnectOptions,
    pub(super) connect_timeout: Duration,
    pub(super) idle_timeout: Duration,
}

/// A connection with the settings that the relay relies on.
pub(super) struct Session {
    pub(super) connection: MySqlConnection,
    /// Which server answered, since it was started last.
    pub(super) server: u64,
    /// What is unsafe about this server, in words.
    pub(super) warnings: Vec<String>,
    /// Whether others on the way may read along.
    pub(super) exposed: bool,
    used: Instant,
}

impl Session {
    /// Connects, sets the session up and reads everything back.
    pub(super) async fn open(settings: &Settings) -> Result<Self, StoreError> {
        let opened = tokio::time::timeout(settings.connect_timeout, Self::set_up(settings)).await;
        opened.unwrap_or_else(|_| Err(StoreErrorKind::Unavailable.into()))
    }

    async fn set_up(settings: &Settings) -> Result<Self, StoreError> {
        // Statements of the relay hold no secrets, but they are long.
        let options = settings.options.clone().disable_statement_logging();
        let mut connection = options.connect().await.map_err(store_error)?;
        let mut answers =
            run(&mut connection, set_up(settings.idle_timeout)).await?.into_iter().skip(2);
        let mut variables = HashMap::new();
        for row in &text::take(&mut answers)?.rows {
            let word = |column| -> Result<String, StoreError> {
                let word = text::bytes(row, column)?.unwrap_or_default();
                Ok(String::from_utf8_lossy(word).into_owned())
            };
            variables.insert(word(0)?.to_ascii_lowercase(), word(1)?);
        }
        let cipher = text::take(&mut answers)?;
        let cipher = cipher.rows.first().map(|row| text::bytes(row, 1)).transpose()?.flatten();
        let encrypted = cipher.is_some_and(|cipher| !cipher.is_empty());
        let (socket, host) = (settings.options.get_socket(), settings.options.get_host());
        let exposed = is_exposed(encrypted, socket.is_some(), host);
        let clock = text::take(&mut answers)?;
        let clock = clock.rows.first().map(|row| text::number(row, 0)).transpose()?;
        let start = text::take(&mut answers)?;
        let start = start.rows.first().map(|row| text::bytes(row, 0)).transpose()?.flatten();
        let start = start.unwrap_or_default().to_vec();
        let server = Server(variables);
        server.verify(settings.idle_timeout)?;
        if server.may_log_keys_only() {
            log_keys_only(&mut connection).await?;
        }
        let warnings = server.warnings(Duration::from_micros(clock.unwrap_or_default()));
        let server = server.identity(&start);
        Ok(Self { connection, server, warnings, exposed, used: Instant::now() })
    }

    /// Whether the server may already have closed it, since it sees no traffic for so long.
    pub(super) fn is_stale(&self, settings: &Settings) -> bool {
        self.used.elapsed() > settings.idle_timeout / 2
    }

    /// Marks it as used now.
    pub(super) fn touch(&mut self) {
        self.used = Instant::now();
    }
}

/// The packet that sets a session up: two SETs, the variables, the cipher, the clock, and when the
/// server was started.
///
/// At REPEATABLE READ the relay's deletes lock gaps, and the application's inserts deadlock. A
/// stopped relay must not hold a lock until the server's default of eight hours. Without its memory
/// MySQL would scan for a list, and lock what it passes. The dispatcher limits the time of statements
/// itself, and learns from those that take too long: a server that ends them earlier would keep it from
/// that. Comments of the form `/*M! */` are read by MariaDB alone, those with a version
/// of MySQL by MySQL alone.
fn set_up(idle: Duration) -> String {
    let idle = idle_seconds(idle);
    format!(
        "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED;\
         SET SESSION autocommit=1, completion_type=0, \
           innodb_lock_wait_timeout={LOCK_WAIT_SECONDS}, lock_wait_timeout={LOCK_WAIT_SECONDS}, \
           wait_timeout={idle}, sql_mode='{SQL_MODE}', \
           sql_safe_updates=0, sql_select_limit=18446744073709551615, sql_big_selects=1\
           /*M! , idle_transaction_timeout={idle}, in_predicate_conversion_threshold=1000, \
             max_statement_time=0 */\
           /*!80016 , range_optimizer_max_mem_size=8388608, max_execution_time=0 */;\
         SHOW SESSION VARIABLES WHERE Variable_name IN (\
           'transaction_isolation', 'tx_isolation', 'autocommit', 'completion_type', \
           'innodb_lock_wait_timeout', 'lock_wait_timeout', 'wait_timeout', \
           'idle_transaction_timeout', 'sql_mode', 'max_allowed_packet', \
           'server_uuid', 'server_id', 'hostname', 'port', 'datadir', \
           'read_only', 'super_read_only', 'innodb_read_only', \
           'auto_increment_increment', 'wsrep_on', 'log_bin', 'binlog_format');\
         SHOW SESSION STATUS LIKE 'Ssl_cipher';\
         SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6));\
         SELECT UNIX_TIMESTAMP() - VARIABLE_VALUE \
         FROM /*M! information_schema */ /*!80016 performance_schema */ .global_status \
         WHERE VARIABLE_NAME = 'Uptime'"
    )
}

/// Has the binary log keep of a deleted row what tells it apart, where this user may ask for that:
/// otherwise the log takes each message once more when it is deleted, a third of what a delete
/// costs. Whoever may not is refused by the server, and all is as the server has it.
async fn log_keys_only(connection: &mut MySqlConnection) -> Result<(), StoreError> {
    match sqlx::raw_sql("SET SESSION binlog_row_image = MINIMAL").execute(connection).await {
        Ok(_) | Err(sqlx::Error::Database(_)) => Ok(()),
        Err(error) => Err(store_error(error)),
    }
}

fn idle_seconds(idle: Duration) -> u64 {
    idle.min(LONGEST_IDLE).as_secs().max(1)
}

/// The variables of a session, under lower-case names.
struct Server(HashMap<String, String>);

impl Server {
    fn get(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    fn is_on(&self, name: &str) -> bool {
        matches!(self.get(name).to_ascii_uppercase().as_str(), "ON" | "1")
    }

    /// Checks that the session is as it was set, and the server one that can be written.
    fn verify(&self, idle: Duration) -> Result<(), StoreError> {
        // A replica, or a former primary: whatever it shows may be old.
        if ["read_only", "super_read_only", "innodb_read_only"].iter().any(|name| self.is_on(name))
        {
            return Err(StoreError::new(StoreErrorKind::Unavailable, "server is read-only"));
        }
        if self.is_on("log_bin") && self.get("binlog_format").eq_ignore_ascii_case("STATEMENT") {
            return Err(unsupported("binlog_format=STATEMENT bears no READ COMMITTED"));
        }
        let isolation = ["transaction_isolation", "tx_isolation"];
        if !isolation.iter().any(|name| self.get(name) == "READ-COMMITTED") {
            return Err(unsupported("isolation level is not READ COMMITTED"));
        }
        let packet = self.get("max_allowed_packet").parse::<u64>();
        if packet.is_ok_and(|bytes| bytes < LEAST_PACKET) {
            return Err(unsupported("max_allowed_packet is below 1 MiB"));
        }
        let idle = idle_seconds(idle).to_string();
        let lock_wait = &LOCK_WAIT_SECONDS.to_string();
        let expected = [
            ("autocommit", "ON"),
            ("completion_type", "NO_CHAIN"),
            ("innodb_lock_wait_timeout", lock_wait),
            ("lock_wait_timeout", lock_wait),
            ("wait_timeout", &idle),
            ("sql_mode", SQL_MODE),
        ];
        if expected.iter().any(|(name, value)| self.get(name) != *value) {
            return Err(unsupported("session settings did not take effect"));
        }
        // MariaDB alone has it.
        match self.get("idle_transaction_timeout") {
            "" => Ok(()),
            set if set == idle => Ok(()),
            _ => Err(unsupported("session settings did not take effect")),
        }
    }

    /// Whether there is a log to keep small; Galera's own replication is left as it is.
    fn may_log_keys_only(&self) -> bool {
        self.is_on("log_bin") && !self.is_on("wsrep_on")
    }

    /// What tells this server from another one, and from what it was before it was started again: rows
    /// that were seen may be gone, and their ids given to others. Both servers compute the time for
    /// which they run from the clock that a statement sees: so the time of the start, in whole seconds,
    /// stays the same, however slow the answer is and whatever the clock does.
    fn identity(&self, start: &[u8]) -> u64 {
        let mut hasher = DefaultHasher::new();
        start.hash(&mut hasher);
        for name in ["server_uuid", "server_id", "hostname", "port", "datadir"] {
            self.get(name).hash(&mut hasher);
        }
        hasher.finish()
    }

    fn warnings(&self, clock: Duration) -> Vec<String> {
        let mut warnings = Vec::new();
        if !matches!(self.get("auto_increment_increment"), "" | "1") {
            warnings.push("auto_increment_increment is not 1: order needs one writing node".into());
        }
        if self.is_on("wsrep_on") {
            warnings.push("wsrep_on is set: order needs one writing node".into());
        }
        let ours = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if ours.abs_diff(clock) > SKEW {
            warnings.push("clocks of database and relay differ by more than 5 s".into());
        }
        warnings
    }
}

fn unsupported(why: &'static str) -> StoreError {
    StoreError::new(StoreErrorKind::Unsupported, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Duration = Duration::from_secs(60);

    fn server(changes: &[(&str, &str)]) -> Server {
        let good = [
            ("transaction_isolation", "READ-COMMITTED"),
            ("autocommit", "ON"),
            ("completion_type", "NO_CHAIN"),
            ("innodb_lock_wait_timeout", "3"),
            ("lock_wait_timeout", "3"),
            ("wait_timeout", "60"),
            ("sql_mode", SQL_MODE),
            ("max_allowed_packet", "1048576"),
            ("read_only", "OFF"),
            ("server_uuid", "a"),
        ];
        let all = good.iter().chain(changes);
        Server(all.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    fn kind(changes: &[(&str, &str)]) -> Option<StoreErrorKind> {
        server(changes).verify(IDLE).err().map(|error| error.kind())
    }

    #[test]
    fn a_session_is_read_back() {
        use StoreErrorKind as K;
        assert_eq!(kind(&[]), None);
        assert_eq!(kind(&[("read_only", "ON")]), Some(K::Unavailable));
        assert_eq!(kind(&[("super_read_only", "ON")]), Some(K::Unavailable));
        assert_eq!(kind(&[("transaction_isolation", "REPEATABLE-READ")]), Some(K::Unsupported));
        assert_eq!(kind(&[("autocommit", "OFF")]), Some(K::Unsupported));
        assert_eq!(kind(&[("wait_timeout", "28800")]), Some(K::Unsupported));
        assert_eq!(kind(&[("lock_wait_timeout", "86400")]), Some(K::Unsupported));
        assert_eq!(kind(&[("sql_mode", "ORACLE")]), Some(K::Unsupported));
        assert_eq!(kind(&[("max_allowed_packet", "65536")]), Some(K::Unsupported));
        assert_eq!(kind(&[("idle_transaction_timeout", "0")]), Some(K::Unsupported));
        assert_eq!(kind(&[("idle_transaction_timeout", "60")]), None);
        let statement = [("log_bin", "ON"), ("binlog_format", "STATEMENT")];
        assert_eq!(kind(&statement), Some(K::Unsupported));
    }

    #[test]
    fn any_time_of_silence_is_one_that_servers_take() {
        assert_eq!(idle_seconds(Duration::ZERO), 1);
        assert_eq!(idle_seconds(Duration::from_millis(2_500)), 2);
        assert_eq!(idle_seconds(Duration::MAX), 31_536_000);
    }

    #[test]
    fn two_servers_differ_and_so_does_one_that_was_started_again() {
        let one = server(&[]).identity(b"1764590000");
        assert_eq!(one, server(&[]).identity(b"1764590000"));
        assert_ne!(one, server(&[("server_uuid", "b")]).identity(b"1764590000"));
        assert_ne!(one, server(&[("hostname", "other")]).identity(b"1764590000"));
        assert_ne!(one, server(&[]).identity(b"1764590001"));
    }

    #[test]
    fn what_endangers_order_and_a_clock_that_differs_are_warnings() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        assert_eq!(server(&[]).warnings(now), Vec::<String>::new());
        let endangered = server(&[("auto_increment_increment", "2"), ("wsrep_on", "ON")]);
        assert_eq!(endangered.warnings(now).len(), 2);
        assert_eq!(server(&[]).warnings(now + Duration::from_secs(60)).len(), 1);
    }
}
