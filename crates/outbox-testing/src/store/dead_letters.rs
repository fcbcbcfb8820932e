//! The operator's side.

use std::time::Duration;

use async_trait::async_trait;
use outbox_core::dead_letters::{Cursor, DeadLetter, DeadLetterQuery, Place};
use outbox_core::store::StoreError;
use outbox_core::{DeadLetters, MessageId, Position};

use super::MemoryStore;
use super::state::{DeadRow, State};

#[async_trait]
impl DeadLetters for MemoryStore {
    async fn list(&self, query: &DeadLetterQuery) -> Result<Vec<DeadLetter>, StoreError> {
        let (state, now) = (self.lock(), self.now());
        let wanted = state.died().filter(|(cursor, row)| {
            query.place.is_none_or(|place| place == cursor.place)
                && query.topic.as_ref().is_none_or(|topic| topic == row.message.topic())
                && query.older_than.is_none_or(|age| now.saturating_sub(row.death.at) >= age)
                && query.after.is_none_or(|after| after < *cursor)
        });
        let page = wanted.take(query.limit as usize);
        Ok(page.map(|(cursor, row)| letter(cursor, row, now)).collect())
    }

    async fn get(&self, id: MessageId) -> Result<Option<DeadLetter>, StoreError> {
        let (state, now) = (self.lock(), self.now());
        let named = state.died().filter(|(_, row)| row.message.id() == id);
        let newest = named.max_by_key(|(cursor, row)| (row.death.at, *cursor));
        Ok(newest.map(|(cursor, row)| letter(cursor, row, now)))
    }

    async fn retry(&self, ids: &[MessageId]) -> Result<u64, StoreError> {
        let (mut state, now) = (self.lock(), self.now());
        let named = named(&state, ids);
        for cursor in &named {
            match cursor.place {
                Place::Held => state.unhold(Position(cursor.row)),
                Place::Dead => state.revive(cursor.row, now),
            }
        }
        Ok(named.len() as u64)
    }

    async fn skip(&self, ids: &[MessageId]) -> Result<u64, StoreError> {
        let mut state = self.lock();
        let mut named = named(&state, ids);
        named.retain(|cursor| cursor.place == Place::Held);
        for cursor in &named {
            state.bury(Position(cursor.row));
        }
        Ok(named.len() as u64)
    }

    async fn discard(&self, ids: &[MessageId]) -> Result<u64, StoreError> {
        let mut state = self.lock();
        let named = named(&state, ids);
        for cursor in &named {
            state.discard(*cursor);
        }
        Ok(named.len() as u64)
    }
}

/// The places of all held and dead messages with one of these ids.
fn named(state: &State, ids: &[MessageId]) -> Vec<Cursor> {
    let named = state.died().filter(|(_, row)| ids.contains(&row.message.id()));
    named.map(|(cursor, _)| cursor).collect()
}

fn letter(cursor: Cursor, row: DeadRow, now: Duration) -> DeadLetter {
    let id = row.message.id();
    let message = (!row.garbled).then_some(row.message);
    DeadLetter::new(id, message, cursor, now.saturating_sub(row.death.at)).with_history(
        row.position,
        row.attempts,
        row.death.failure,
    )
}
