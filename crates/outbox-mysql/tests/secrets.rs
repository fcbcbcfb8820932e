//! A password in the URL of a database, and what an application writes, are never shown: not by
//! `Debug`, not by an error, not in the log.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outbox_core::store::{StoreError, StoreErrorKind};
use outbox_core::{Message, MessageId, Store};
use outbox_mysql::sqlx::mysql::MySqlConnectOptions;
use outbox_mysql::{MySqlInbox, MySqlInsert, MySqlOutbox, MySqlSchema, MySqlStore, MySqlWriter};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

const PASSWORD: &str = "canary-password-81f2";
const CONTENT: [&str; 3] = ["canary-key-5f1c", "canary-payload-77ab", "canary-header-e09d"];

/// Everything that was shown to anybody.
#[derive(Clone, Default)]
struct Shown(Arc<Mutex<Vec<u8>>>);

impl Shown {
    fn show(&self, what: impl std::fmt::Debug) {
        writeln!(self.clone(), "{what:?} {what:#?}").expect("it is in memory");
    }

    fn error(&self, error: &dyn std::error::Error) {
        let mut next = Some(error);
        while let Some(error) = next {
            writeln!(self.clone(), "{error} {error:?}").expect("it is in memory");
            next = error.source();
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("nobody panics with it")).into_owned()
    }

    /// The log of this thread at its finest goes here until the guard is dropped.
    fn log(&self) -> tracing::subscriber::DefaultGuard {
        let writer = self.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::level_filters::LevelFilter::TRACE)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::set_default(subscriber)
    }
}

impl Write for Shown {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("nobody panics with it").extend_from_slice(bytes);
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

#[track_caller]
fn assert_clean(shown: &Shown) {
    let text = shown.text();
    for canary in CONTENT.into_iter().chain([PASSWORD]) {
        for form in forms(canary) {
            let line = text.lines().find(|line| line.contains(&form));
            assert_eq!(line, None, "{canary} was shown");
        }
    }
}

fn message() -> Message {
    let [key, payload, header] = CONTENT;
    let builder = Message::builder("orders").key(key).payload(payload).header("auth", header);
    builder.build().expect("valid")
}

fn options(host: &str, port: u16) -> MySqlConnectOptions {
    MySqlConnectOptions::new()
        .host(host)
        .port(port)
        .username("relay")
        .password(PASSWORD)
        .database("shop")
}

/// Everything that can be tried with options that lead nowhere.
async fn try_everything(shown: &Shown, options: MySqlConnectOptions) -> Vec<StoreErrorKind> {
    let schema = MySqlSchema::new();
    let store = MySqlStore::from_options(options.clone(), &schema);
    shown.show(&store);
    let mut kinds = Vec::new();
    let mut note = |error: StoreError| {
        shown.error(&error);
        kinds.push(error.kind());
    };
    note(store.open().await.expect_err("nobody is there"));
    note(store.backlog().await.expect_err("nobody is there"));
    let ids = [MessageId::generate()];
    let discarded = outbox_core::DeadLetters::discard(&store, &ids).await;
    note(discarded.expect_err("nobody is there"));
    kinds
}

#[test]
fn what_a_user_holds_in_hand_shows_no_secret() {
    let shown = Shown::default();
    let schema = MySqlSchema::new().with_prefix("shop_").expect("a plain word");
    let writer = MySqlWriter::new(&schema);
    shown.show((&schema, &writer, MySqlOutbox::new(writer.clone())));
    shown.show(MySqlInbox::new(&schema, "billing").expect("a name"));
    shown.show(MySqlInsert::new(&schema, &[message()]));
    shown.show(MySqlInsert::new(&schema, &[message()]).values());
    shown.show(MySqlStore::from_options(options("db", 3306), &schema));
    assert!(shown.text().contains("shop_outbox"), "things were shown");
    assert_clean(&shown);
}

#[tokio::test]
async fn a_url_that_is_none_shows_no_password() {
    let shown = Shown::default();
    let _log = shown.log();
    let schema = MySqlSchema::new();
    for url in [
        format!("mysql://relay:{PASSWORD}@db:no-port/shop"),
        format!("mysql://relay:{PASSWORD}@[::1/shop"),
        format!("mysql://relay:{PASSWORD}@db/shop?ssl-mode=no-such-mode"),
        format!("mysql://relay:{PASSWORD}@db/shop?ssl-ca={PASSWORD}&charset=%FF"),
        format!("postgres://relay:{PASSWORD}@db/shop"),
        format!("relay:{PASSWORD}@db"),
        PASSWORD.to_owned(),
    ] {
        let connecting = MySqlStore::connect(&url, &schema);
        let connected = tokio::time::timeout(Duration::from_secs(60), connecting).await;
        shown.error(&connected.expect("it ends").expect_err("nothing to connect to"));
    }
    assert!(shown.text().contains("connection options are invalid"), "{}", shown.text());
    assert_clean(&shown);
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_shows_no_password() {
    let shown = Shown::default();
    let _log = shown.log();
    // A port where nobody listens any more, and a name that no resolver knows.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("its address").port();
    drop(listener);
    for options in [options("127.0.0.1", port), options("no-such-host.invalid", 3306)] {
        let kinds = try_everything(&shown, options).await;
        assert_eq!(kinds, [StoreErrorKind::Unavailable; 3]);
    }
    let socket = options("db", 3306).socket("/nowhere/no.sock");
    let kinds = try_everything(&shown, socket).await;
    assert_eq!(kinds, [StoreErrorKind::Unavailable; 3]);
    assert!(shown.text().contains("connection failed"), "errors were shown");
    assert_clean(&shown);
}

/// A packet of the protocol: its length, its number, its content.
fn packet(content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).expect("a short one").to_le_bytes();
    [&length[..3], &[0], content].concat()
}

/// An error as a server sends it instead of its greeting; texts of servers quote what they like.
fn error_packet(number: u16, state: &str, text: &str) -> Vec<u8> {
    let number = number.to_le_bytes();
    packet(&[&[0xff][..], &number, b"#", state.as_bytes(), text.as_bytes()].concat())
}

#[tokio::test]
async fn a_server_that_answers_with_secrets_does_not_get_them_shown() {
    let shown = Shown::default();
    let text = format!("Access denied: '{PASSWORD}', duplicate entry '{}'", CONTENT.join("-"));
    let answers = [
        error_packet(1045, "28000", &text),
        error_packet(1040, "08004", &text),
        error_packet(9999, "HY000", &text),
        packet(text.as_bytes()),
        text.clone().into_bytes(),
        Vec::new(),
    ];
    for answer in answers {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let serving = tokio::spawn(async move {
            loop {
                let Ok((mut client, _)) = listener.accept().await else { return };
                _ = client.write_all(&answer).await;
                _ = client.shutdown().await;
                _ = client.read_to_end(&mut Vec::new()).await;
            }
        });
        let _log = shown.log();
        assert_eq!(try_everything(&shown, options("127.0.0.1", port)).await.len(), 3);
        serving.abort();
    }
    let text = shown.text();
    for word in ["server error 1045 (28000)", "server error 1040", "server error 9999"] {
        assert!(text.contains(word), "{word:?} was not exercised: {text}");
    }
    assert_clean(&shown);
}
