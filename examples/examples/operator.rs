//! Teaches what an operator does with messages that died, as a command of its own.
//!
//! ```text
//! export DATABASE_URL=mysql://operator:password@localhost/shop
//! cargo run --example operator -- list
//! cargo run --example operator -- retry 01990c39-7f2b-7c1e-b1a5-0d3f5c9b8a77
//! ```
//!
//! | command | what it does |
//! |---|---|
//! | `list [held\|dead]` | one line for each message that died, oldest first; held ones bar their key |
//! | `show <id>` | all there is of one message |
//! | `retry <id>..` | offers them again; a held one in its place, a dead one after newer ones of its key |
//! | `skip <id>..` | moves held ones to the dead letters, so that their keys go on |
//! | `discard <id>..` | deletes them for good |
//!
//! `OUTBOX_TABLE_PREFIX` is the prefix of the tables, if they have one. What was changed is printed,
//! and may be less than what was named: an id that is neither held nor dead is left alone. It ends
//! with 0 when all were changed, with 1 when not, with 2 when it was called wrongly.

use std::env;
use std::process::ExitCode;

use anyhow::{Context, Result};
use outbox_core::dead_letters::{DeadLetter, DeadLetterQuery, Place};
use outbox_core::{DeadLetters, MessageId};
use outbox_mysql::{MySqlSchema, MySqlStore};

const USAGE: &str =
    "usage: operator list [held|dead] | show <id> | retry <id>.. | skip <id>.. | discard <id>..";
/// The exit code when the command makes no sense: repeating it would not help.
const MISUSED: u8 = 2;

#[derive(Debug, PartialEq)]
enum Command {
    List(Option<Place>),
    Show(MessageId),
    Retry(Vec<MessageId>),
    Skip(Vec<MessageId>),
    Discard(Vec<MessageId>),
}

impl Command {
    fn read(words: &[String]) -> Result<Self> {
        let (verb, rest) = words.split_first().context(USAGE)?;
        let place = || match rest {
            [] => Some(None),
            [place] if place == "held" => Some(Some(Place::Held)),
            [place] if place == "dead" => Some(Some(Place::Dead)),
            _ => None,
        };
        let ids = || {
            let id = |text: &String| text.parse().with_context(|| format!("{text:?} is no id"));
            let ids = rest.iter().map(id).collect::<Result<Vec<MessageId>>>()?;
            (!ids.is_empty()).then_some(ids).context(USAGE)
        };
        match verb.as_str() {
            "list" => place().map(Self::List).context(USAGE),
            "show" => match *ids()? {
                [id] => Ok(Self::Show(id)),
                _ => Err(anyhow::Error::msg(USAGE)),
            },
            "retry" => ids().map(Self::Retry),
            "skip" => ids().map(Self::Skip),
            "discard" => ids().map(Self::Discard),
            _ => Err(anyhow::Error::msg(USAGE)),
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let command = match Command::read(&words) {
        Ok(command) => command,
        Err(error) => {
            eprintln!("operator: {error:#}");
            return ExitCode::from(MISUSED);
        }
    };
    match run(command).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("operator: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all that was asked for was there.
async fn run(command: Command) -> Result<bool> {
    let url = env::var("DATABASE_URL").context("set DATABASE_URL to a MySQL or MariaDB")?;
    let prefix = env::var("OUTBOX_TABLE_PREFIX").unwrap_or_default();
    let schema = match prefix.as_str() {
        "" => MySqlSchema::new(),
        prefix => MySqlSchema::new().with_prefix(prefix)?,
    };
    let store = MySqlStore::connect(&url, &schema).await?;
    match &command {
        Command::List(place) => list(&store, *place).await,
        Command::Show(id) => show(&store, *id).await,
        Command::Retry(ids) | Command::Skip(ids) | Command::Discard(ids) => {
            let mut changed = 0;
            for id in ids {
                // One that died more than once is changed as often.
                let of_it = match command {
                    Command::Retry(_) => store.retry(&[*id]).await?,
                    Command::Skip(_) => store.skip(&[*id]).await?,
                    _ => store.discard(&[*id]).await?,
                };
                changed += usize::from(of_it > 0);
            }
            println!("changed: {changed} of {}", ids.len());
            Ok(changed == ids.len())
        }
    }
}

/// Page by page: there may be many.
async fn list(store: &impl DeadLetters, place: Option<Place>) -> Result<bool> {
    let mut query = DeadLetterQuery::new();
    query.place = place;
    loop {
        let page = store.list(&query).await?;
        for letter in &page {
            println!("{}", line(letter));
        }
        match page.last() {
            Some(last) => query.after = Some(last.cursor),
            None => return Ok(true),
        }
    }
}

async fn show(store: &impl DeadLetters, id: MessageId) -> Result<bool> {
    let Some(letter) = store.get(id).await? else {
        println!("neither held nor dead: {id}");
        return Ok(false);
    };
    println!("{}", line(&letter));
    if let Some(message) = &letter.message {
        for (name, value) in message.headers().iter() {
            println!("{name}: {}", text(value));
        }
        println!("\n{}", text(message.payload()));
    }
    Ok(true)
}

fn line(letter: &DeadLetter) -> String {
    // A row that was not written by an outbox may hold no valid message.
    let message = letter.message.as_ref();
    format!(
        "{} {} topic={} key={} attempts={} age={}s failure={}",
        letter.cursor.place,
        letter.id,
        message.map_or("?", |message| message.topic()),
        text(message.and_then(|message| message.key())),
        letter.attempts,
        letter.age.as_secs(),
        letter.failure,
    )
}

/// Bytes as a terminal may show them: no control character reaches it.
fn text(bytes: Option<&[u8]>) -> String {
    match bytes {
        Some(bytes) => bytes.escape_ascii().to_string(),
        None => "(none)".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &[&str]) -> Result<Command> {
        Command::read(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_command_is_read_whole_or_refused() {
        let (one, other) = (MessageId::generate(), MessageId::generate());
        let [first, second] = [one.to_string(), other.to_string()];
        assert_eq!(read(&["list"]).unwrap(), Command::List(None));
        assert_eq!(read(&["list", "held"]).unwrap(), Command::List(Some(Place::Held)));
        assert_eq!(read(&["show", &first]).unwrap(), Command::Show(one));
        assert_eq!(read(&["skip", &first, &second]).unwrap(), Command::Skip(vec![one, other]));
        let wrong: [&[&str]; 6] = [
            &[],
            &["drop", &first],
            &["list", "all"],
            &["retry"],
            &["show", &first, &second],
            &["discard", &first, "secret"],
        ];
        for words in wrong {
            assert!(read(words).is_err(), "{words:?}");
        }
    }

    #[test]
    fn what_a_message_holds_cannot_command_a_terminal() {
        assert_eq!(text(Some(b"a\x1b[2Jb\n")), r"a\x1b[2Jb\n");
    }
}
