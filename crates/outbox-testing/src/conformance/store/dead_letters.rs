//! What an operator can do with messages that died.

#![allow(clippy::unwrap_used, reason = "a case fails by panicking")]

use std::time::{Duration, Instant};

use outbox_core::dead_letters::{DeadLetter, DeadLetterQuery, Place};
use outbox_core::delivery::Settlement;
use outbox_core::store::{Claimed, Purge};
use outbox_core::{Delivery, Message, MessageId};

use super::stage::{Letters, POLLS, delivery, everything, failed, message};
use super::{DeadLettersFixture, Stage};
use crate::drop_after;

/// A message that died is kept in full, with its place and its history.
pub async fn a_dead_message_is_kept_in_full<F: DeadLettersFixture>() {
    let (stage, letters) = set::<F>().await;
    let whole = Message::builder("orders")
        .key([0, 255])
        .payload([1, 2, 255])
        .header("h", "1")
        .null_header("n")
        .header("h", "2")
        .partition(3);
    let whole = whole.build().unwrap();
    let empty = Message::builder("orders").tombstone().build().unwrap();
    let died =
        [stage.kill(whole, Settlement::Dead).await, stage.kill(empty, Settlement::Held).await];
    for (row, place) in died.iter().zip([Place::Dead, Place::Held]) {
        let letter = letters.get(row.message.id()).await.unwrap();
        assert_eq!(letter.message.as_ref(), Some(&row.message));
        assert_eq!((letter.cursor.place, letter.position), (place, row.position));
        assert_eq!(letter.attempts, 3);
        assert_eq!(letter.failure, "failed: the broker said no");
    }
}

/// Held messages are listed before dead ones, each oldest first; others are not listed.
pub async fn held_and_dead_messages_are_listed<F: DeadLettersFixture>() {
    let (stage, letters) = set::<F>().await;
    stage.add(message("orders", "pending")).await;
    let dead = kill_all(&stage, ["a", "b"], Settlement::Dead).await;
    let held = kill_all(&stage, ["c", "d"], Settlement::Held).await;
    let list = async |query: DeadLetterQuery| ids(&letters.list(&query).await);
    assert_eq!(list(DeadLetterQuery::new()).await, [held.clone(), dead.clone()].concat());
    assert_eq!(list(DeadLetterQuery::new().place(Place::Held)).await, held);
    assert_eq!(list(DeadLetterQuery::new().place(Place::Dead)).await, dead);
}

/// A listing can be narrowed to a topic and to messages that died some time ago.
pub async fn a_listing_can_be_narrowed<F: DeadLettersFixture>() {
    let time = Duration::from_secs(2);
    let (stage, letters) = set::<F>().await;
    let old = kill_all(&stage, ["a", "b"], Settlement::Dead).await;
    stage.fixture.pass(time).await;
    let began = Instant::now();
    let young = stage.kill(message("other", "c"), Settlement::Held).await.message.id();
    let list = async |query: DeadLetterQuery| ids(&letters.list(&query).await);
    assert_eq!(list(DeadLetterQuery::new().topic("other")).await, [young]);
    assert_eq!(list(DeadLetterQuery::new().topic("orders").limit(1)).await, old[..1]);
    assert_eq!(list(DeadLetterQuery::new().older_than(began.elapsed() + time * 9 / 10)).await, old);
    assert!(list(DeadLetterQuery::new().topic("none")).await.is_empty());
}

/// A listing goes on behind the cursor of its last message, page by page.
pub async fn a_listing_goes_on_behind_a_cursor<F: DeadLettersFixture>() {
    let (stage, letters) = set::<F>().await;
    let dead = kill_all(&stage, ["a", "b", "c"], Settlement::Dead).await;
    let held = kill_all(&stage, ["d", "e"], Settlement::Held).await;
    let (mut listed, mut query) = (Vec::new(), DeadLetterQuery::new().limit(2));
    loop {
        let page = letters.list(&query).await;
        assert!(page.len() <= 2);
        let Some(last) = page.last() else { break };
        query = query.after(last.cursor);
        listed.extend(ids(&page));
        assert!(listed.len() <= 5, "a message is listed twice");
    }
    assert_eq!(listed, [held, dead].concat());
}

/// A message that is neither held nor dead is not found, and no verb touches it.
pub async fn verbs_ignore_other_messages<F: DeadLettersFixture>() {
    let (stage, letters) = set::<F>().await;
    let waiting = stage.kill(message("orders", "a"), Settlement::Retry(Duration::from_secs(500)));
    let ids = [waiting.await.message.id(), MessageId::generate()];
    assert!(letters.get(ids[0]).await.is_none());
    assert!(letters.get(ids[1]).await.is_none());
    assert_eq!(letters.retry(&ids).await, 0);
    assert_eq!(letters.skip(&ids).await, 0);
    assert_eq!(letters.discard(&ids).await, 0);
    assert_eq!(letters.retry(&[]).await, 0);
    let state = stage.delivery(ids[0]).await.state;
    assert_eq!(state.attempts, 3);
    assert!(state.wait > Duration::ZERO);
}

/// A held message that is retried keeps its place and starts again without attempts.
pub async fn a_held_message_that_is_retried_keeps_its_place<F: DeadLettersFixture>() {
    let (stage, letters) = set::<F>().await;
    let held = stage.kill(message("orders", "a"), Settlement::Held).await;
    let later = stage.add(message("orders", "a")).await;
    let id = held.message.id();
    assert_eq!(letters.retry(&[id]).await, 1);
    assert_eq!(letters.retry(&[id]).await, 0);
    assert_eq!(stage.messages().await, [id, later]);
    let now = stage.delivery(id).await;
    assert_eq!((now.position, now.state.attempts), (held.position, 0));
    assert_eq!((now.state.held, now.state.retried, now.state.wait), (false, false, Duration::ZERO));
    assert!(letters.get(id).await.is_none());
}

/// What was decided on a reading from before an operator's verb changes nothing any more.
pub async fn a_decision_from_before_a_verb_is_refused<F: DeadLettersFixture>() {
    let (stage, letters) = set::<F>().await;
    let held = stage.kill(message("orders", "a"), Settlement::Held).await;
    letters.retry(&[held.message.id()]).await;
    let now = stage.delivery(held.message.id()).await;
    assert!(now.state.revision > held.state.revision, "{:?}", now.state);
    let lease = stage.lease_for(&now).await;
    let old = failed(&held, lease, 1, Settlement::Held); // Read with no attempts, as now.
    assert_eq!(stage.fail(&[old]).await.refused, [held.position]);
    let new = failed(&now, lease, 1, Settlement::Held);
    assert_eq!(stage.fail(&[new]).await.refused, []);
}

/// A dead message that is retried goes last, marked, with the same id and no attempts.
pub async fn a_dead_message_that_is_retried_goes_last<F: DeadLettersFixture>() {
    let (stage, letters) = set::<F>().await;
    let dead = stage.kill(message("orders", "a"), Settlement::Dead).await;
    let newer = stage.add(message("orders", "a")).await;
    let id = dead.message.id();
    assert_eq!(letters.retry(&[id]).await, 1);
    assert_eq!(letters.retry(&[id]).await, 0);
    assert_eq!(stage.messages().await, [newer, id]);
    let now = stage.delivery(id).await;
    assert_eq!((&now.message, now.lane), (&dead.message, dead.lane));
    assert_eq!((now.state.attempts, now.state.retried), (0, true));
    let reply = stage.claim(everything().fetch(&[now.position]).watch(&[now.position])).await;
    let fetched = reply.rows.into_iter().map(|row| delivery(row).state);
    let told: Vec<_> = fetched.chain(reply.watched.iter().map(|row| row.state)).collect();
    assert_eq!(told, [now.state, now.state], "as a fetch and a watch tell it, and a page");
    assert!(letters.get(id).await.is_none());
}

/// Purging leaves a dead message that is retried: it is pending like any other.
pub async fn purging_leaves_a_dead_message_that_is_retried<F: DeadLettersFixture>() {
    let (stage, letters) = set::<F>().await;
    let id = stage.kill(message("orders", "a"), Settlement::Dead).await.message.id();
    let retry = async { letters.retry(&[id]).await };
    let purge = stage.purge(Purge::new(Duration::ZERO, 100));
    let (retried, purged) = tokio::join!(retry, purge);
    assert_eq!((retried, purged), (1, 0));
    assert_eq!(super::purging::purge_everything(&stage).await, 0);
    assert_eq!(stage.messages().await, [id]);
}

/// A retried dead message can die again.
pub async fn a_retried_message_can_die_again<F: DeadLettersFixture>() {
    let (stage, letters) = set::<F>().await;
    let id = stage.kill(message("orders", "a"), Settlement::Dead).await.message.id();
    letters.retry(&[id]).await;
    let row = stage.delivery(id).await;
    let lease = stage.lease_for(&row).await;
    assert_eq!(stage.fail(&[failed(&row, lease, 1, Settlement::Dead)]).await.refused, []);
    let letter = letters.get(id).await.unwrap();
    assert_eq!((letter.position, letter.attempts), (row.position, 1));
}

/// A held message that is skipped moves to the dead letters; a dead one stays there.
pub async fn a_held_message_that_is_skipped_is_dead<F: DeadLettersFixture>() {
    let (stage, letters) = set::<F>().await;
    let held = stage.kill(message("orders", "a"), Settlement::Held).await;
    let later = stage.add(message("orders", "a")).await;
    let id = held.message.id();
    assert_eq!(letters.skip(&[id]).await, 1);
    assert_eq!(letters.skip(&[id]).await, 0);
    assert_eq!(stage.messages().await, [later]);
    let letter = letters.get(id).await.unwrap();
    assert_eq!(letter.message.as_ref(), Some(&held.message));
    assert_eq!((letter.cursor.place, letter.position), (Place::Dead, held.position));
    assert_eq!((letter.attempts, letter.failure.as_str()), (3, "failed: the broker said no"));
}

/// An id that was added twice may be dead twice: the newest is found, and verbs change both.
pub async fn a_verb_changes_every_message_of_an_id<F: DeadLettersFixture>() {
    let (stage, letters) = set::<F>().await;
    let message = message("orders", "a");
    let id = message.id();
    let dead = stage.kill(message.clone(), Settlement::Dead).await;
    stage.fixture.pass(Duration::from_millis(5)).await;
    let held = stage.kill(message, Settlement::Held).await;
    assert_eq!(letters.get(id).await.unwrap().position, held.position);
    let listed = letters.list(&DeadLetterQuery::new()).await;
    let listed: Vec<_> = listed.iter().map(|letter| letter.position).collect();
    assert_eq!(listed, [held.position, dead.position]);
    assert_eq!(letters.retry(&[id]).await, 2);
    assert!(letters.get(id).await.is_none());
    let rows: Vec<_> = stage.all().await.rows.into_iter().map(delivery).collect();
    let places: Vec<_> = rows.iter().map(|row| (row.message.id(), row.state.retried)).collect();
    assert_eq!(places, [(id, false), (id, true)]);
    assert_eq!(rows[0].position, held.position);
}

/// Discarding deletes held and dead messages for good, and nothing else.
pub async fn discarded_messages_are_gone<F: DeadLettersFixture>() {
    let (stage, letters) = set::<F>().await;
    let pending = stage.add(message("orders", "pending")).await;
    let held = kill_all(&stage, ["a", "b"], Settlement::Held).await;
    let dead = kill_all(&stage, ["c", "d"], Settlement::Dead).await;
    let named = [held[0], dead[0], pending];
    assert_eq!(letters.discard(&named).await, 2);
    assert_eq!(letters.discard(&named).await, 0);
    let left = ids(&letters.list(&DeadLetterQuery::new()).await);
    assert_eq!(left, [held[1], dead[1]]);
    assert_eq!(stage.messages().await, [pending, held[1]]);
    let last = stage.delivery(held[1]).await.position;
    assert_eq!(letters.discard(&left).await, 2);
    let next = stage.add(message("orders", "e")).await;
    assert!(stage.delivery(next).await.position > last, "a position is handed out once");
}

/// Of two operators who act on a message at the same time, one changes it: their answers count it
/// once, and it is in one place.
pub async fn of_two_operators_at_the_same_time_one_changes_a_message<F: DeadLettersFixture>() {
    let (stage, letters) = set::<F>().await;
    for _ in 0..5 {
        let id = [stage.kill(message("orders", "a"), Settlement::Dead).await.message.id()];
        let retry = async || letters.retry(&id).await;
        let (one, other) = tokio::join!(retry(), retry());
        assert_eq!(one + other, 1, "retried");
        assert_eq!(stage.messages().await, id);
        stage.deliver(&[&stage.delivery(id[0]).await], false).await;

        let id = [stage.kill(message("orders", "a"), Settlement::Dead).await.message.id()];
        let discard = letters.discard(&id);
        let retry = letters.retry(&id);
        let (retried, discarded) = tokio::join!(retry, discard);
        assert_eq!(retried + discarded, 1, "retried or discarded");
        assert!(letters.get(id[0]).await.is_none());
        let row = stage.find(id[0]).await;
        assert_eq!(row.is_some(), retried == 1, "pending if it was retried");
        if let Some(row) = row {
            stage.deliver(&[&row], false).await;
        }

        let id = [stage.kill(message("orders", "a"), Settlement::Held).await.message.id()];
        let skip = async || letters.skip(&id).await;
        let (one, other) = tokio::join!(skip(), skip());
        assert_eq!(one + other, 1, "skipped");
        let left = letters.list(&DeadLetterQuery::new()).await;
        assert_eq!((ids(&left), stage.messages().await), (id.to_vec(), vec![]));
        assert_eq!(letters.discard(&id).await, 1);
    }
}

/// A verb that is dropped at any await point leaves a message in one place, and repeating it ends
/// well.
pub async fn a_dropped_verb_leaves_a_message_in_one_place<F: DeadLettersFixture>() {
    let (stage, letters) = set::<F>().await;
    for polls in 1..POLLS {
        let id = [stage.kill(message("orders", "a"), Settlement::Dead).await.message.id()];
        let ended = drop_after(polls, letters.0.retry(&id)).await.is_some_and(|done| done.is_ok());
        letters.retry(&id).await;
        assert_eq!(stage.messages().await, id, "after {polls} polls of a retry");
        assert!(letters.get(id[0]).await.is_none());
        stage.deliver(&[&stage.delivery(id[0]).await], false).await;
        if ended {
            break;
        }
    }
    for polls in 1..POLLS {
        let id = [stage.kill(message("orders", "a"), Settlement::Held).await.message.id()];
        let ended = drop_after(polls, letters.0.skip(&id)).await.is_some_and(|done| done.is_ok());
        letters.skip(&id).await;
        let left = letters.list(&DeadLetterQuery::new()).await;
        let places: Vec<_> = left.iter().map(|letter| (letter.id, letter.cursor.place)).collect();
        assert_eq!(places, [(id[0], Place::Dead)], "after {polls} polls of a skip");
        assert_eq!(stage.messages().await, []);
        let discarded =
            drop_after(polls, letters.0.discard(&id)).await.is_some_and(|done| done.is_ok());
        letters.discard(&id).await;
        assert!(letters.get(id[0]).await.is_none(), "after {polls} polls of a discard");
        if ended && discarded {
            break;
        }
    }
}

/// An unreadable row can be held, listed, skipped and discarded; it has no message to show.
///
/// Passes at once if the store cannot hold such a row.
pub async fn an_unreadable_row_can_be_operated_on<F: DeadLettersFixture>() {
    let (stage, letters) = set::<F>().await;
    let held = stage.kill(message("orders", "a"), Settlement::Held).await;
    let id = held.message.id();
    if !stage.fixture.garble(id).await {
        return;
    }
    let listed = letters.list(&DeadLetterQuery::new()).await;
    assert_eq!(ids(&listed), [id]);
    assert_eq!(letters.retry(&[id]).await, 1);
    let rows = stage.all().await.rows;
    let [Claimed::Unreadable(row)] = &rows[..] else { panic!("{rows:?}") };
    assert_eq!((row.state.held, row.state.attempts), (false, 0));
    let lease = stage.lease_for(&held).await;
    let mut again = failed(&held, lease, 1, Settlement::Held);
    again.read = row.state;
    assert_eq!(stage.fail(&[again]).await.refused, []);
    for place in [Place::Held, Place::Dead] {
        let letter = letters.get(id).await.unwrap();
        assert_eq!((letter.message, letter.cursor.place), (None, place));
        letters.skip(&[id]).await;
    }
    assert_eq!(letters.discard(&[id]).await, 1);
}

async fn set<F: DeadLettersFixture>() -> (Stage<F>, Letters) {
    let stage = Stage::<F>::set().await;
    let letters = Letters(stage.fixture.dead_letters());
    (stage, letters)
}

async fn kill_all<F: DeadLettersFixture, const N: usize>(
    stage: &Stage<F>,
    keys: [&str; N],
    how: Settlement,
) -> Vec<MessageId> {
    let mut ids = Vec::new();
    for key in keys {
        let row: Delivery = stage.kill(message("orders", key), how.clone()).await;
        ids.push(row.message.id());
    }
    ids
}

fn ids(letters: &[DeadLetter]) -> Vec<MessageId> {
    letters.iter().map(|letter| letter.id).collect()
}
