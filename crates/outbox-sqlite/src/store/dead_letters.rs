//! The operator's side: held messages in the outbox, dead ones in a table of their own.
//!
//! A verb looks the rows of a message up, then changes each by primary key in a transaction that
//! holds every condition.

use std::time::Duration;

use async_trait::async_trait;
use outbox_core::DeadLetters;
use outbox_core::dead_letters::{Cursor, DeadLetter, DeadLetterQuery, Place};
use outbox_core::delivery::Position;
use outbox_core::message::MessageId;
use outbox_core::store::StoreError;
use sqlx::sqlite::SqliteRow;

use super::SqliteStore;
use super::row::{count, read_message};
use super::settle::{copy_to_dead, remove_dead};
use crate::tables::Tables;
use crate::text::{self, Hex, NOW};

#[async_trait]
impl DeadLetters for SqliteStore {
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
        let condition = format!("message_id = {}", Hex(id.as_bytes()));
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

impl SqliteStore {
    /// Applies a verb to every held and dead row of these messages, each in its own transaction.
    /// The first statement of a verb tells whether it did anything.
    async fn change(
        &self,
        ids: &[MessageId],
        verb: impl Fn(&Tables, &Row) -> Option<String> + Send + Sync,
    ) -> Result<u64, StoreError> {
        let mut changed = 0;
        let mut unit = self.0.rest.begin().await?;
        for message in ids {
            let found = unit.run(look_up(self.tables(), *message)).await?;
            for (place, answer) in [Place::Held, Place::Dead].into_iter().zip(found) {
                for row in &answer.rows {
                    let row = Row { place, id: text::number(row, 0)?, message: *message };
                    let Some(verb) = verb(self.tables(), &row) else { continue };
                    let answers = unit.run(format!("BEGIN IMMEDIATE;{verb}COMMIT")).await?;
                    changed += answers.get(1).map_or(0, |answer| answer.affected);
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
        "SELECT id FROM {outbox} INDEXED BY {held} \
           WHERE held_at IS NOT NULL AND message_id = {message};\
         SELECT id FROM {dead} WHERE message_id = {message} ORDER BY id",
        outbox = tables.outbox,
        held = tables.held_message,
        dead = tables.dead,
    )
}

/// A held row.
fn held(row: &Row) -> String {
    let message = Hex(row.message.as_bytes());
    format!("id = {} AND message_id = {message} AND held_at IS NOT NULL", row.id)
}

/// Offers a held message again in its place.
fn release(tables: &Tables, row: &Row) -> String {
    format!(
        "UPDATE {} SET held_at = NULL, attempts = 0, available_at = NULL, revision = revision + 1 \
         WHERE {};",
        tables.outbox,
        held(row)
    )
}

/// Offers a dead message again, in a new place. It gets a new `created_at`: no row may be older
/// than one with a smaller id.
fn revive(tables: &Tables, row: &Row) -> String {
    let Row { id, .. } = row;
    format!(
        "INSERT INTO {outbox} (message_id, topic, message_key, partition_no, headers, payload, \
           revision, retried) \
         SELECT message_id, topic, message_key, partition_no, headers, payload, \
           revision + 1, TRUE FROM {dead} WHERE id = {id};\
         DELETE FROM {dead} WHERE id = {id};",
        outbox = tables.outbox,
        dead = tables.dead,
    )
}

/// Moves a held message to the dead letters.
fn bury(tables: &Tables, row: &Row) -> String {
    let id = i64::try_from(row.id).unwrap_or(i64::MAX);
    copy_to_dead(tables, "attempts", "last_error", &held(row))
        + &remove_dead(tables, id, Hex(row.message.as_bytes()))
}

fn discard(tables: &Tables, row: &Row) -> String {
    match row.place {
        Place::Held => format!("DELETE FROM {} WHERE {};", tables.outbox, held(row)),
        Place::Dead => format!("DELETE FROM {} WHERE id = {};", tables.dead, row.id),
    }
}

/// The conditions of a listing; `None` when nothing can match.
fn condition(query: &DeadLetterQuery, place: Place) -> Option<String> {
    let mut all = vec!["TRUE".to_owned()];
    if let Some(topic) = &query.topic {
        all.push(format!("topic = CAST({} AS TEXT)", Hex(topic.as_bytes())));
    }
    if let Some(age) = query.older_than {
        let age = i64::try_from(age.as_micros()).unwrap_or(i64::MAX);
        all.push(format!("{NOW} - {} >= {age}", since(place)));
    }
    match query.after {
        Some(after) if after.place > place => return None,
        Some(after) if after.place == place => all.push(format!("id > {}", after.row)),
        _ => {}
    }
    Some(all.join(" AND "))
}

fn since(place: Place) -> &'static str {
    match place {
        Place::Held => "held_at",
        Place::Dead => "died_at",
    }
}

/// Rows of one place, oldest first. Held ones are found by their index, which is as small as they
/// are few, and sorted without their content.
fn select(tables: &Tables, place: Place, condition: &str, limit: u32) -> String {
    let since = since(place);
    let (from, origin, condition) = match place {
        Place::Held => {
            let condition = format!(
                "id IN (SELECT id FROM {} INDEXED BY {} \
                   WHERE held_at IS NOT NULL AND {condition} ORDER BY id LIMIT {limit})",
                tables.outbox, tables.held_message,
            );
            (&tables.outbox, "id", condition)
        }
        Place::Dead => (&tables.dead, "outbox_id", condition.to_owned()),
    };
    format!(
        "SELECT id, {origin}, attempts, last_error, {NOW} - {since}, message_id, topic, \
           message_key, partition_no, headers, payload \
         FROM {from} WHERE {condition} ORDER BY id LIMIT {limit}"
    )
}

fn read(row: &SqliteRow, place: Place) -> Result<DeadLetter, StoreError> {
    let cursor = Cursor { place, row: text::number(row, 0)? };
    let age = Duration::from_micros(text::number(row, 4)?);
    let id = MessageId::from_bytes(text::id(row, 5)?);
    let failure = String::from_utf8_lossy(text::bytes(row, 3)?.unwrap_or_default()).into_owned();
    let letter = DeadLetter::new(id, read_message(row, 5).ok(), cursor, age);
    let position = Position(text::number(row, 1)?);
    Ok(letter.with_history(position, count(row, 2)?, failure))
}
