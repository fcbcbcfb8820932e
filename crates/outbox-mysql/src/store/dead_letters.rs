//! The operator's side: held messages in the outbox, dead ones in a table of their own.
//!
//! A verb looks the rows of a message up, then changes each by primary key in a packet that holds
//! every condition. Rows are locked in one order everywhere: outbox, held, dead.

use std::time::Duration;

use async_trait::async_trait;
use outbox_core::DeadLetters;
use outbox_core::dead_letters::{Cursor, DeadLetter, DeadLetterQuery, Place};
use outbox_core::delivery::Position;
use outbox_core::message::MessageId;
use outbox_core::store::StoreError;
use sqlx::mysql::MySqlRow;

use super::MySqlStore;
use super::row::{LastTopic, read_message};
use super::settle::{copy_to_dead, delete_sql, remove_dead};
use crate::tables::Tables;
use crate::text::{self, Hex};

#[async_trait]
impl DeadLetters for MySqlStore {
    async fn list(&self, query: &DeadLetterQuery) -> Result<Vec<DeadLetter>, StoreError> {
        let mut found = Vec::new();
        let mut unit = self.0.rest.begin().await?;
        for place in [Place::Held, Place::Dead] {
            let room = query.limit.saturating_sub(u32::try_from(found.len()).unwrap_or(u32::MAX));
            let wanted = query.place.is_none_or(|wanted| wanted == place);
            let Some(condition) = condition(query, place).filter(|_| wanted && room > 0) else {
                continue;
            };
            let sql = select(self.tables(), place, &condition, room);
            for row in unit.run(sql).await?.iter().flat_map(|answer| &answer.rows) {
                found.push(read(row, place)?);
            }
        }
        unit.finish();
        Ok(found)
    }

    async fn get(&self, id: MessageId) -> Result<Option<DeadLetter>, StoreError> {
        let condition = format!("x.message_id = {}", Hex(id.as_bytes()));
        let mut found: Option<DeadLetter> = None;
        let mut unit = self.0.rest.begin().await?;
        for place in [Place::Held, Place::Dead] {
            let sql = select(self.tables(), place, &condition, u32::MAX);
            for row in unit.run(sql).await?.iter().flat_map(|answer| &answer.rows) {
                let letter = read(row, place)?;
                if found.as_ref().is_none_or(|newest| letter.age <= newest.age) {
                    found = Some(letter);
                }
            }
        }
        unit.finish();
        Ok(found)
    }

    async fn retry(&self, ids: &[MessageId]) -> Result<u64, StoreError> {
        self.change(ids, |tables, row| match row.place {
            Place::Held => Some(release(tables, row)),
            Place::Dead => Some(revive(tables, row)),
        })
        .await
    }

    async fn skip(&self, ids: &[MessageId]) -> Result<u64, StoreError> {
        self.change(ids, |tables, row| match row.place {
            Place::Held => Some(bury(tables, row)),
            Place::Dead => None,
        })
        .await
    }

    async fn discard(&self, ids: &[MessageId]) -> Result<u64, StoreError> {
        self.change(ids, |tables, row| Some(discard(tables, row))).await
    }
}

/// A row of a message: its id in the table of its place.
struct Row {
    place: Place,
    id: u64,
    message: MessageId,
}

/// A packet, and the number of the statement that tells whether it did anything.
struct Verb {
    packet: String,
    decisive: usize,
}

impl MySqlStore {
    /// Applies a verb to every held and dead row of these messages, each in its own transaction.
    async fn change(
        &self,
        ids: &[MessageId],
        verb: impl Fn(&Tables, &Row) -> Option<Verb> + Send + Sync,
    ) -> Result<u64, StoreError> {
        let mut changed = 0;
        let mut unit = self.0.rest.begin().await?;
        for message in ids {
            let found = unit.run(look_up(self.tables(), *message)).await?;
            for (place, answer) in [Place::Held, Place::Dead].into_iter().zip(found) {
                for row in &answer.rows {
                    let row = Row { place, id: text::number(row, 0)?, message: *message };
                    let Some(verb) = verb(self.tables(), &row) else { continue };
                    let answers = unit.run(verb.packet).await?;
                    changed += answers.get(verb.decisive).map_or(0, |answer| answer.affected);
                }
            }
        }
        unit.finish();
        Ok(changed)
    }
}

fn look_up(tables: &Tables, message: MessageId) -> String {
    let message = Hex(message.as_bytes());
    format!(
        "SELECT outbox_id FROM {} WHERE message_id = {message};\
         SELECT id FROM {} WHERE message_id = {message} ORDER BY id",
        tables.held, tables.dead,
    )
}

/// Locks the row, whatever its state: what a second operator finds released the relay may hold again
/// before his packet has ended, and then its place in the list must stay.
fn lock(tables: &Tables, id: u64, message: &Hex<'_>) -> String {
    format!(
        "SELECT id FROM {} FORCE INDEX (PRIMARY) WHERE id = {id} AND message_id = {message} FOR UPDATE",
        tables.outbox,
    )
}

/// Offers a held message again in its place.
fn release(tables: &Tables, row: &Row) -> Verb {
    let Row { id, message, .. } = row;
    let message = Hex(message.as_bytes());
    let packet = format!(
        "BEGIN;{lock};\
         UPDATE {outbox} FORCE INDEX (PRIMARY) SET held_at = NULL, attempts = 0, available_at = NULL, \
           revision = revision + 1 \
         WHERE id = {id} AND message_id = {message} AND held_at IS NOT NULL;\
         DELETE FROM {held} WHERE outbox_id = {id} AND message_id = {message};\
         COMMIT",
        lock = lock(tables, *id, &message),
        outbox = tables.outbox,
        held = tables.held,
    );
    Verb { packet, decisive: 2 }
}

/// Offers a dead message again, in a new place. Its row is locked first, so that two operators
/// make one copy. It gets a new `created_at`: no row may be older than one with a smaller id.
fn revive(tables: &Tables, row: &Row) -> Verb {
    let Row { id, .. } = row;
    let packet = format!(
        "BEGIN;\
         SELECT id FROM {dead} WHERE id = {id} FOR UPDATE;\
         INSERT INTO {outbox} (message_id, topic, message_key, partition_no, headers, payload, \
           revision, retried) \
         SELECT message_id, topic, message_key, partition_no, headers, payload, \
           revision + 1, TRUE FROM {dead} WHERE id = {id};\
         DELETE FROM {dead} WHERE id = {id};\
         COMMIT",
        outbox = tables.outbox,
        dead = tables.dead,
    );
    Verb { packet, decisive: 3 }
}

/// Moves a held message to the dead letters.
fn bury(tables: &Tables, row: &Row) -> Verb {
    let Row { id, message, .. } = row;
    let message = Hex(message.as_bytes());
    let from = format!(
        "FROM {} o WHERE o.id = {id} AND o.message_id = {message} AND o.held_at IS NOT NULL \
         FOR UPDATE",
        tables.outbox,
    );
    let packet = format!(
        "BEGIN;{copy}{remove}COMMIT",
        copy = copy_to_dead(tables, "o.attempts", "o.last_error", &from),
        remove = remove_dead(tables, Position(*id), &message),
    );
    Verb { packet, decisive: 1 }
}

fn discard(tables: &Tables, row: &Row) -> Verb {
    let Row { id, message, place } = row;
    let message = Hex(message.as_bytes());
    match place {
        Place::Held => {
            let packet = format!(
                "BEGIN;{lock};{delete};\
                 DELETE FROM {held} WHERE outbox_id = {id} AND message_id = {message};\
                 COMMIT",
                lock = lock(tables, *id, &message),
                delete = delete_sql(
                    tables,
                    &format!("o.id = {id} AND o.message_id = {message} AND o.held_at IS NOT NULL"),
                ),
                held = tables.held,
            );
            Verb { packet, decisive: 2 }
        }
        Place::Dead => {
            let packet = format!("BEGIN;DELETE FROM {} WHERE id = {id};COMMIT", tables.dead);
            Verb { packet, decisive: 1 }
        }
    }
}

/// The conditions of a listing; `None` when nothing can match.
fn condition(query: &DeadLetterQuery, place: Place) -> Option<String> {
    let mut all = vec!["TRUE".to_owned()];
    if let Some(topic) = &query.topic {
        if !topic.is_ascii() {
            return None; // The column holds ASCII.
        }
        all.push(format!("x.topic = _ascii {}", Hex(topic.as_bytes())));
    }
    if let Some(age) = query.older_than {
        let since = since(place);
        let age = u64::try_from(age.as_micros()).unwrap_or(u64::MAX);
        all.push(format!("TIMESTAMPDIFF(MICROSECOND, {since}, UTC_TIMESTAMP(6)) >= {age}"));
    }
    match query.after {
        Some(after) if after.place > place => return None,
        Some(after) if after.place == place => all.push(format!("{} > {}", key(place), after.row)),
        _ => {}
    }
    Some(all.join(" AND "))
}

fn key(place: Place) -> &'static str {
    match place {
        Place::Held => "x.outbox_id",
        Place::Dead => "x.id",
    }
}

fn since(place: Place) -> &'static str {
    match place {
        Place::Held => "x.held_at",
        Place::Dead => "x.died_at",
    }
}

/// Rows of one place, oldest first.
fn select(tables: &Tables, place: Place, condition: &str, limit: u32) -> String {
    let (from, content) = match place {
        Place::Held => {
            let from = format!(
                "{} x STRAIGHT_JOIN {} m FORCE INDEX (PRIMARY) \
                 ON m.id = x.outbox_id AND m.message_id = x.message_id AND m.held_at IS NOT NULL",
                tables.held, tables.outbox
            );
            (from, "m")
        }
        Place::Dead => (format!("{} x", tables.dead), "x"),
    };
    let m = content;
    format!(
        "SELECT {key}, x.outbox_id, {m}.attempts, {m}.last_error, \
           TIMESTAMPDIFF(MICROSECOND, {since}, UTC_TIMESTAMP(6)), {m}.message_id, {m}.topic, \
           {m}.message_key, {m}.partition_no, {m}.headers, {m}.payload \
         FROM {from} WHERE {condition} ORDER BY {key} LIMIT {limit}",
        key = key(place),
        since = since(place),
    )
}

fn read(row: &MySqlRow, place: Place) -> Result<DeadLetter, StoreError> {
    let cursor = Cursor { place, row: text::number(row, 0)? };
    let age = Duration::from_micros(text::number(row, 4)?);
    let id = MessageId::from_bytes(text::id(row, 5)?);
    let failure = String::from_utf8_lossy(text::bytes(row, 3)?.unwrap_or_default()).into_owned();
    let letter =
        DeadLetter::new(id, read_message(row, 5, &mut LastTopic::default()).ok(), cursor, age);
    let position = Position(text::number(row, 1)?);
    Ok(letter.with_history(position, text::fit(row, 2)?, failure))
}
