//! Rows appear if and only if their transaction committed, and as they were written.

#![allow(clippy::unwrap_used, reason = "a case fails by panicking")]

use std::collections::BTreeSet;
use std::time::Duration;

use outbox_core::delivery::{Settlement, Span};
use outbox_core::store::Page;
use outbox_core::{AddErrorKind, Delivery, Message, Position};

use super::stage::{MANY, delivery, everything, message, spread};
use super::{Stage, StoreFixture};

const ANYWHERE: [Span; 1] = [Span::new(Position::START, Position(u64::MAX))];

/// A message appears when its transaction commits, and not before.
pub async fn a_message_appears_when_its_transaction_commits<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let mut transaction = stage.fixture.begin().await;
    stage.add_in(&mut transaction, message("orders", "a")).await;
    let request = everything().page(Page::new(&stage.lanes, Position::START, MANY));
    let reply = stage.claim(request.sweep(&ANYWHERE)).await;
    assert!(reply.rows.is_empty(), "a page shows an open transaction: {:?}", reply.rows);
    assert!(reply.swept.is_empty(), "a sweep shows an open transaction: {:?}", reply.swept);
    stage.fixture.commit(transaction).await;
    let reply = stage.claim(request.sweep(&ANYWHERE)).await;
    assert_eq!((reply.rows.len(), reply.swept.len()), (1, 1));
}

/// A message of a transaction that was rolled back never appears, and adding did not commit.
pub async fn a_message_of_a_rolled_back_transaction_never_appears<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let mut transaction = stage.fixture.begin().await;
    stage.add_in(&mut transaction, message("orders", "a")).await;
    stage.add_in(&mut transaction, message("orders", "b")).await;
    stage.fixture.roll_back(transaction).await;
    let kept = stage.add(message("orders", "c")).await;
    assert_eq!(stage.messages().await, [kept]);
}

/// A message of a savepoint that was rolled back never appears; one of a savepoint that was released
/// appears with its transaction.
///
/// Passes at once for a store without savepoints.
pub async fn a_message_of_a_rolled_back_savepoint_never_appears<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let [first, lost, kept, last] = ["1", "2", "3", "4"].map(|key| message("orders", key));
    let ids = [first.id(), kept.id(), last.id()];
    let mut transaction = stage.fixture.begin().await;
    stage.add_in(&mut transaction, first).await;
    if !stage.fixture.add_in_savepoint(&mut transaction, lost, false).await {
        return;
    }
    assert!(stage.fixture.add_in_savepoint(&mut transaction, kept, true).await);
    stage.add_in(&mut transaction, last).await;
    assert!(stage.messages().await.is_empty(), "a released savepoint is no commit");
    stage.fixture.commit(transaction).await;
    assert_eq!(stage.messages().await, ids);
}

/// Messages of one transaction stand in the order in which they were added.
pub async fn messages_stand_in_the_order_in_which_they_were_added<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let first = stage.add_all(spread(20)).await;
    let mut transaction = stage.fixture.begin().await;
    let mut second = Vec::new();
    for message in spread(5) {
        second.push(message.id());
        stage.add_in(&mut transaction, message).await;
    }
    stage.fixture.commit(transaction).await;
    let third = stage.add_all(spread(20)).await;
    assert_eq!(stage.messages().await, [first, second, third].concat());
}

/// Adding on a connection without an open transaction is refused, and nothing is inserted.
///
/// Passes at once for a store whose types allow no such thing.
pub async fn adding_without_an_open_transaction_is_refused<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let Some(mut connection) = stage.fixture.connect().await else { return };
    let error = stage.outbox().add(&mut connection, message("orders", "a")).await.unwrap_err();
    assert_eq!(error.kind(), AddErrorKind::NoTransaction);
    drop(connection);
    assert!(stage.messages().await.is_empty());
}

/// Every byte of a message is read as it was written; null and empty stay different.
pub async fn a_message_is_read_as_it_was_written<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let bytes: Vec<u8> = (0..=255).collect();
    let all = Message::builder("a.B_c-9")
        .key(bytes.clone())
        .payload(bytes.clone())
        .header("repeated", "1")
        .null_header("null")
        .header("repeated", bytes)
        .header("empty", "")
        .partition(7);
    let messages = [
        all.build().unwrap(),
        Message::builder("t").key("").payload("").build().unwrap(),
        Message::builder("t").no_key().payload("").build().unwrap(),
        Message::builder("t").key("k").tombstone().build().unwrap(),
        Message::builder(&"t".repeat(249) as &str).key([0; 1_024]).payload("").build().unwrap(),
        Message::builder("t").key("big").payload(vec![7; 900_000]).build().unwrap(),
    ];
    stage.add_all(messages.clone()).await;
    let mut read = Vec::new();
    for row in stage.all().await.rows {
        read.push(stage.whole(row).await.message);
    }
    assert_eq!(read, messages);
}

/// Messages of one key are in one lane, whatever their topic; the lane never changes.
pub async fn a_key_is_in_one_lane<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let same_key = ["a", "b", "a"].map(|topic| message(topic, "one-key"));
    stage.add_all(same_key).await;
    let rows = stage.all().await.rows.into_iter();
    let lanes: BTreeSet<_> = rows.map(|row| delivery(row).lane).collect();
    assert_eq!(lanes.len(), 1);
    assert!(lanes.iter().all(|lane| stage.lanes.contains(lane)));
}

/// A row that commits late, below rows that were read already, is seen by a sweep.
///
/// Passes at once for a store whose rows become visible in order.
pub async fn a_late_commit_is_seen_by_the_sweep<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    if stage.in_commit_order {
        return;
    }
    let mut late = stage.fixture.begin().await;
    stage.add_in(&mut late, message("orders", "late")).await;
    stage.add(message("orders", "early")).await;
    let covered = stage.all().await.covered;
    stage.fixture.commit(late).await;

    let below = [Span::new(Position::START, covered.previous())];
    let page = Page::new(&stage.lanes, covered, MANY);
    let reply = stage.claim(everything().page(page).sweep(&below)).await;
    assert!(reply.rows.is_empty(), "nothing stands above the first page: {:?}", reply.rows);
    let [late] = reply.swept[..] else { panic!("one late row expected: {:?}", reply.swept) };
    let fetched = stage.claim(everything().fetch(&[late.position])).await;
    let row = delivery(fetched.rows.into_iter().next().unwrap());
    assert_eq!((row.lane, row.message.key()), (late.lane, Some(&b"late"[..])));
}

/// Whatever was committed when a claim's page was read is seen by its sweep, while writers commit.
pub async fn the_sweep_is_not_older_than_the_page<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let writing = async {
        for number in 0..60 {
            stage.add(message("orders", &number.to_string())).await;
            tokio::task::yield_now().await;
        }
    };
    let reading = async {
        let mut after = Position::START;
        for _ in 0..60 {
            let page = Page::new(&stage.lanes, after, MANY);
            let reply = stage.claim(everything().page(page).sweep(&ANYWHERE)).await;
            let swept: BTreeSet<_> = reply.swept.iter().map(|row| row.position).collect();
            for row in &reply.rows {
                let position = row.position();
                assert!(swept.contains(&position), "row {position} is in the page only");
            }
            after = reply.covered;
            tokio::task::yield_now().await;
        }
    };
    both(writing, reading).await;
}

/// Where a store says that its rows become visible in order, none appears below one that was seen:
/// the dispatcher never looks for it.
///
/// Passes at once for a store that does not say so.
pub async fn rows_of_a_store_in_commit_order_appear_in_order<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    if !stage.in_commit_order {
        return;
    }
    let mut first = stage.fixture.begin().await;
    stage.add_in(&mut first, message("orders", "first")).await;
    let beside = async {
        let mut second = stage.fixture.begin().await;
        stage.add_in(&mut second, message("orders", "second")).await;
        stage.fixture.commit(second).await;
    };
    if tokio::time::timeout(Duration::from_millis(500), beside).await.is_err() {
        return; // One writer at a time.
    }
    let seen = stage.all().await.covered;
    stage.fixture.commit(first).await;
    let above = stage.page(seen, MANY).await.rows.len();
    assert_eq!(above, 1, "a row that was committed later is not above {seen}, which was read");
}

/// A position is handed out once: not again when its row is delivered, archived or dead.
pub async fn a_position_is_handed_out_once<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let mut last = Position::START;
    let mut assert_next = |row: &Delivery| {
        assert!(row.position > last, "{} after {last}", row.position);
        last = row.position;
    };
    for archive in [false, true] {
        let id = stage.add(message("orders", "a")).await;
        let row = stage.delivery(id).await;
        assert_next(&row);
        stage.deliver(&[&row], archive).await;
    }
    assert_next(&stage.kill(message("orders", "a"), Settlement::Dead).await);
    let id = stage.add(message("orders", "a")).await;
    assert_next(&stage.delivery(id).await);
}

/// A look at open rows shows committed ones as well; unless the store cannot see them, those of open
/// transactions; and none that were rolled back. A store in commit order is never asked.
pub async fn an_open_row_is_seen_by_the_open_look<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    if !stage.fixture.sees_open_rows() {
        if !stage.in_commit_order {
            stage.add(message("orders", "committed")).await;
            assert_eq!(stage.claim(everything().open(&ANYWHERE)).await.open.len(), 1);
        }
        return;
    }
    let mut open = stage.fixture.begin().await;
    stage.add_in(&mut open, message("orders", "open")).await;
    stage.add(message("orders", "committed")).await;
    let look = everything().open(&ANYWHERE);
    assert_eq!(stage.claim(look).await.open.len(), 2);
    stage.fixture.roll_back(open).await;
    assert_eq!(stage.claim(look).await.open.len(), 1);
}

/// Runs two futures to their ends, in turns.
async fn both(first: impl Future<Output = ()>, second: impl Future<Output = ()>) {
    let (mut first, mut second) = (std::pin::pin!(first), std::pin::pin!(second));
    let (mut first_done, mut second_done) = (false, false);
    std::future::poll_fn(|context| {
        first_done = first_done || first.as_mut().poll(context).is_ready();
        second_done = second_done || second.as_mut().poll(context).is_ready();
        if first_done && second_done {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}
