//! A claim is a read: pages, sweeps, fetches, watches and scans, within a byte budget.

#![allow(clippy::unwrap_used, reason = "a case fails by panicking")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use outbox_core::delivery::{RowState, Settlement, Span};
use outbox_core::store::{Claim, Claimed, Page};
use outbox_core::{Lane, Message, Position};

use super::stage::{MANY, delivery, everything, failed, message, spread};
use super::{Stage, StoreFixture};

/// A page holds the rows above its start, ascending; an empty one covers nothing and ends.
pub async fn a_page_is_ascending_and_above_its_start<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let empty = stage.page(Position(7), MANY).await;
    assert!(empty.rows.is_empty() && empty.passed.is_empty() && empty.end, "{empty:?}");
    assert_eq!(empty.covered, Position(7));
    stage.add_all(spread(30)).await;
    let whole = stage.all().await;
    let positions: Vec<Position> = whole.rows.iter().map(Claimed::position).collect();
    assert_eq!(positions.len(), 30);
    assert!(positions.is_sorted_by(|a, b| a < b), "{positions:?}");
    assert_eq!((whole.covered, whole.end), (positions[29], true));
    let rest = stage.page(positions[9], MANY).await;
    assert_eq!(rest.rows.iter().map(Claimed::position).collect::<Vec<_>>(), positions[10..]);
}

/// Page by page every row is read once, with no more rows in a page than were asked for.
pub async fn pages_read_every_row_once<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let ids = stage.add_all(spread(30)).await;
    let (mut read, mut after, mut ended) = (Vec::new(), Position::START, false);
    for _ in 0..MANY {
        let page = stage.page(after, 7).await;
        assert!(page.rows.len() <= 7, "{} rows in a page of 7", page.rows.len());
        if let Some(last) = page.rows.last() {
            assert!(page.covered >= last.position());
        }
        after = page.covered;
        ended = page.end;
        read.extend(page.rows.into_iter().map(|row| delivery(row).message.id()));
        if ended {
            break;
        }
    }
    assert!(ended, "the pages never end");
    assert_eq!(read, ids);
}

/// A page returns the bare positions of other lanes' rows, so that they are no holes.
///
/// Passes at once for a store with one lane.
pub async fn a_page_tells_the_rows_of_other_lanes_that_it_passed<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    if stage.lanes.len() == 1 {
        return;
    }
    stage.add_all(spread(100)).await;
    let all: Vec<_> = stage.all().await.rows.into_iter().map(delivery).collect();
    let own = all[0].lane;
    let (wanted, passed): (Vec<_>, Vec<_>) = all.iter().partition(|row| row.lane == own);
    assert!(!passed.is_empty(), "100 keys are all in one lane");

    let (mut rows, mut seen, mut after) = (Vec::new(), Vec::new(), Position::START);
    for _ in 0..MANY {
        let page = Page::new(std::slice::from_ref(&own), after, 9);
        let reply = stage.claim(everything().page(page)).await;
        assert!(reply.rows.len() + reply.passed.len() <= 9, "more than 9 rows in a page of 9");
        rows.extend(reply.rows.iter().map(Claimed::position));
        seen.extend(reply.passed);
        after = reply.covered;
        if reply.end {
            break;
        }
    }
    assert_eq!(rows, wanted.iter().map(|row| row.position).collect::<Vec<_>>());
    seen.sort_unstable();
    assert_eq!(seen, passed.iter().map(|row| row.position).collect::<Vec<_>>());
}

/// The newest row, where a store tells it, is the last one of all, with a page or without.
pub async fn the_newest_row_is_the_last_one_of_all<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    stage.add_all(spread(30)).await;
    let all: Vec<_> = stage.all().await.rows.iter().map(Claimed::position).collect();
    let lane = &stage.lanes[..1];
    for (after, newest) in
        [(Position::START, Some(all[29])), (all[28], Some(all[29])), (all[29], None)]
    {
        for claim in [everything(), everything().page(Page::new(lane, after, 2))] {
            let told = stage.claim(claim.newest(Some(after))).await.newest;
            assert!(told.is_none() || told == newest, "{told:?}, {newest:?} above {after}");
            assert_eq!(stage.claim(claim).await.newest, None);
        }
    }
}

/// A page with a last position holds nothing above it.
pub async fn a_bounded_page_ends_at_its_bound<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    stage.add_all(spread(30)).await;
    let all: Vec<_> = stage.all().await.rows.iter().map(Claimed::position).collect();
    let page = Page::new(&stage.lanes, all[4], MANY).through(all[9]);
    let reply = stage.claim(everything().page(page)).await;
    assert_eq!(reply.rows.iter().map(Claimed::position).collect::<Vec<_>>(), all[5..10]);
    assert_eq!(reply.covered, all[9]);
}

/// Page by page, each within its limit, a bounded page reads every row of its lanes up to the bound
/// once, and says when there are no more; what it tells of other lanes is its own affair.
pub async fn bounded_pages_read_every_row_of_their_lanes_once<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    stage.add_all(spread(100)).await;
    let lanes = &stage.lanes[..stage.lanes.len().div_ceil(2)];
    let all: Vec<_> = stage.all().await.rows.into_iter().map(delivery).collect();
    let bound = all[89].position;
    let wanted = all[..90].iter().filter(|row| lanes.contains(&row.lane));
    let (mut read, mut after, mut ended) = (Vec::new(), Position::START, false);
    for _ in 0..MANY {
        let page = Page::new(lanes, after, 7).through(bound);
        let reply = stage.claim(everything().page(page)).await;
        assert!(reply.rows.len() <= 7, "{} rows in a page of 7", reply.rows.len());
        assert!(reply.covered <= bound, "{} is beyond the bound", reply.covered);
        assert!(reply.end || reply.covered > after, "a page leads nowhere");
        read.extend(reply.rows.iter().map(Claimed::position));
        (after, ended) = (reply.covered, reply.end);
        if ended {
            break;
        }
    }
    assert!(ended, "the pages never end");
    assert_eq!(read, wanted.map(|row| row.position).collect::<Vec<_>>());
}

/// Claiming takes no lock and changes nothing: a second claim reads the same.
pub async fn claiming_changes_nothing<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    stage.add_all(spread(5)).await;
    let read = async || {
        let rows = stage.all().await.rows.into_iter().map(delivery);
        rows.map(|row| (row.position, row.message, row.state)).collect::<Vec<_>>()
    };
    assert_eq!(read().await, read().await);
}

/// Claims at the same time show the same rows: none hides what another one reads.
pub async fn claims_at_the_same_time_show_the_same_rows<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    stage.add_all(spread(20)).await;
    let read = async || {
        let rows = stage.all().await.rows.into_iter().map(delivery);
        rows.map(|row| (row.position, row.message)).collect::<Vec<_>>()
    };
    let (one, two, three) = tokio::join!(read(), read(), read());
    assert_eq!(one.len(), 20);
    assert!(one == two && two == three, "three claims beside each other show different rows");
}

/// A claim beside a settle shows a row as it was or not at all, and after the settle not at all.
pub async fn a_claim_beside_a_settle_shows_a_row_whole_or_not_at_all<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    stage.add_all(spread(40)).await;
    let rows: Vec<_> = stage.all().await.rows.into_iter().map(delivery).collect();
    let (settled, left) = rows.split_at(20);
    let settle = async {
        for some in settled.chunks(5) {
            stage.deliver(&some.iter().collect::<Vec<_>>(), true).await;
        }
    };
    let claims = async {
        for _ in 0..20 {
            for row in stage.all().await.rows.into_iter().map(delivery) {
                let known = rows.iter().find(|known| known.position == row.position);
                let known = known.map(|known| (&known.message, known.state));
                assert_eq!(known, Some((&row.message, row.state)), "no row changes by a settle");
            }
        }
    };
    tokio::join!(settle, claims);
    let left: Vec<_> = left.iter().map(|row| row.message.id()).collect();
    assert_eq!(stage.messages().await, left, "what was settled stays away, the rest stays");
}

/// A claim shows rows that wait or are held, with what is recorded about them.
pub async fn waiting_and_held_rows_are_claimed<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let wait = Duration::from_secs(500);
    stage.kill(message("orders", "waiting"), Settlement::Retry(wait)).await;
    stage.kill(message("orders", "held"), Settlement::Held).await;
    let states: Vec<_> = stage.all().await.rows.into_iter().map(|r| delivery(r).state).collect();
    let [waiting, held] = states[..] else { panic!("two rows expected: {states:?}") };
    assert!(!waiting.held && held.held);
    assert!(waiting.wait <= wait && waiting.wait > wait / 2, "{waiting:?}");
    assert_eq!((waiting.attempts, held.attempts), (3, 3));
}

/// Pages, bounded ones, fetches and watches show rows that wait or are held, and tell the same about
/// them; sweeps, scans and looks at open rows show them too.
pub async fn waiting_and_held_rows_are_shown_by_every_read<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let wait = Duration::from_secs(500);
    let waiting = stage.kill(message("orders", "waiting"), Settlement::Retry(wait)).await;
    let held = stage.kill(message("orders", "held"), Settlement::Held).await;
    let positions = [waiting.position, held.position];
    let told = |row: RowState| (row.attempts, row.revision, row.held, row.wait > wait / 2);
    let known: Vec<_> =
        stage.all().await.rows.into_iter().map(|row| told(delivery(row).state)).collect();
    let page = Page::new(&stage.lanes, Position::START, MANY);
    let spans = [Span::new(Position::START, held.position)];
    for (what, request) in [
        ("bounded page", everything().page(page.through(held.position))),
        ("fetch", everything().fetch(&positions)),
    ] {
        let mut rows: Vec<_> = stage.claim(request).await.rows.into_iter().map(delivery).collect();
        rows.sort_by_key(|row| row.position);
        let states: Vec<_> = rows.iter().map(|row| told(row.state)).collect();
        assert_eq!(states, known, "as a {what} tells it, and a page");
    }
    for (position, known) in positions.iter().zip(&known) {
        let fetched = stage.claim(everything().fetch(std::slice::from_ref(position))).await.rows;
        let states: Vec<_> = fetched.into_iter().map(|row| told(delivery(row).state)).collect();
        assert_eq!(states, [*known], "as a fetch of one row tells it, and a page");
    }
    let request = everything().watch(&positions).sweep(&spans).open(&spans).scan(page);
    let mut reply = stage.claim(request).await;
    reply.watched.sort_by_key(|row| row.id.position);
    let states: Vec<_> = reply.watched.iter().map(|row| told(row.state)).collect();
    assert_eq!(states, known, "as a watch tells it, and a page");
    let swept: BTreeSet<_> = reply.swept.iter().map(|row| row.position).collect();
    let scanned: BTreeSet<_> = reply.scanned.iter().map(|row| row.position).collect();
    assert_eq!((swept, scanned), (BTreeSet::from(positions), BTreeSet::from(positions)));
    if stage.fixture.sees_open_rows() {
        assert_eq!(BTreeSet::from_iter(reply.open), BTreeSet::from(positions));
    }
}

/// A fresh row has never failed, and its age is that of the store's clock.
pub async fn a_row_tells_its_age<F: StoreFixture>() {
    const TIME: Duration = Duration::from_millis(300);
    let stage = Stage::<F>::set().await;
    let id = stage.add(message("orders", "a")).await;
    stage.fixture.pass(TIME).await;
    let row = stage.delivery(id).await;
    assert_eq!(row.state, RowState::default());
    assert!(row.age >= TIME && row.age < TIME * 100, "{:?}", row.age);
}

/// When the store's clock is set back, the rows of what is now its future are of no age.
pub async fn a_row_from_the_clocks_future_has_no_age<F: StoreFixture>() {
    const TIME: Duration = Duration::from_secs(3_600);
    const LITTLE: Duration = Duration::from_secs(60);
    let stage = Stage::<F>::set().await;
    let id = stage.add(message("orders", "a")).await;
    if !stage.fixture.set_clock_back(TIME).await {
        return;
    }
    let row = stage.delivery(id).await;
    assert_eq!(row.state, RowState::default());
    assert!(row.age < LITTLE, "{:?}", row.age);
    let oldest = stage.backlog().await.oldest_age;
    assert!(oldest.is_some_and(|age| age < LITTLE), "{oldest:?}");
}

/// The contents of a claim stay within its byte budget; what does not fit is told without content.
pub async fn a_row_beyond_the_byte_budget_is_unread<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let big = |key: &str| Message::builder("t").key(key).payload(vec![1; 10_000]).build().unwrap();
    stage.add_all(["a", "b", "c", "d"].map(big)).await;
    let all: Vec<_> = stage.all().await.rows.iter().map(Claimed::position).collect();
    let page = Page::new(&stage.lanes, Position::START, MANY);
    for request in [Claim::new(25_000).page(page), Claim::new(25_000).fetch(&all)] {
        let reply = stage.claim(request).await;
        let contents = reply.rows.iter().map(|row| match row {
            Claimed::Delivery(delivery) => delivery.message.payload().map_or(0, <[u8]>::len),
            _ => 0,
        });
        assert!(contents.sum::<usize>() <= 25_000);
        // A page may end early; a fetch tells all that exist.
        let whole = request.page.is_none() || reply.end;
        assert!(!whole || reply.rows.len() == all.len(), "a row is missing");
        assert!(!reply.rows.is_empty(), "a row that does not fit is told");
        for row in &reply.rows {
            match row {
                Claimed::Unread(row) => assert!(row.bytes >= 10_000, "{row:?}"),
                Claimed::Delivery(_) => {}
                other => panic!("neither read nor unread: {other:?}"),
            }
        }
    }
}

/// A row fetched alone is returned whole, whatever the budget.
pub async fn a_row_fetched_alone_is_returned_whole<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let big = Message::builder("t").key("k").payload(vec![1; 10_000]).build().unwrap();
    let id = stage.add(big.clone()).await;
    let position = stage.delivery(id).await.position;
    let reply = stage.claim(Claim::new(1).fetch(&[position])).await;
    let rows: Vec<_> = reply.rows.into_iter().map(|row| delivery(row).message).collect();
    assert_eq!(rows, [big]);
}

/// A fetch returns the rows that exist, of any lane, and says nothing about the others.
pub async fn a_fetch_returns_the_rows_that_exist<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    stage.add_all(spread(30)).await;
    let all: Vec<_> = stage.all().await.rows.into_iter().map(delivery).collect();
    stage.deliver(&[&all[3]], false).await;
    let wanted = [all[2].position, all[3].position, all[20].position, Position(u64::MAX / 4)];
    let rows = stage.claim(everything().fetch(&wanted)).await.rows;
    let found: BTreeSet<_> = rows.into_iter().map(|row| delivery(row).message.id()).collect();
    assert_eq!(found, BTreeSet::from([all[2].message.id(), all[20].message.id()]));
}

/// A row that is fetched and on the page as well is told, and no obstacle for the others.
pub async fn a_row_may_be_fetched_and_on_the_page<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let ids = stage.add_all(spread(3)).await;
    let position = stage.delivery(ids[1]).await.position;
    let page = Page::new(&stage.lanes, Position::START, MANY);
    let reply = stage.claim(everything().page(page).fetch(&[position])).await;
    let told: BTreeSet<_> = reply.rows.iter().map(Claimed::position).collect();
    assert_eq!(told.len(), 3, "{told:?}");
    assert_eq!((reply.covered, reply.end), (*told.last().unwrap(), true));
}

/// A watch tells the state of the rows that exist, and whose they are.
pub async fn a_watch_tells_the_state_of_the_rows_that_exist<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let held = stage.kill(message("orders", "held"), Settlement::Held).await;
    let gone = stage.kill(message("orders", "gone"), Settlement::Dead).await;
    let watched = stage.claim(everything().watch(&[held.position, gone.position])).await.watched;
    let [only] = watched[..] else { panic!("one row expected: {watched:?}") };
    assert_eq!((only.id.position, only.id.message), (held.position, held.message.id()));
    assert!(only.state.held);
    assert_eq!(only.state.attempts, 3);
}

/// A sweep lists the rows of its spans, bounds included, whatever their lane.
pub async fn a_sweep_lists_the_rows_of_its_spans_in_every_lane<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    stage.add_all(spread(30)).await;
    let all: Vec<_> = stage.all().await.rows.into_iter().map(delivery).collect();
    let span = |first: usize, last: usize| Span::new(all[first].position, all[last].position);
    let swept = stage.claim(everything().sweep(&[span(2, 9), span(15, 15), span(20, 29)])).await;
    let mut found: Vec<_> = swept.swept.iter().map(|row| (row.position, row.lane)).collect();
    found.sort_unstable();
    let wanted = all[2..10].iter().chain(&all[15..16]).chain(&all[20..30]);
    assert_eq!(found, wanted.map(|row| (row.position, row.lane)).collect::<Vec<_>>());
}

/// A scan walks all rows of its lanes, ascending, and ends with less than was asked for.
pub async fn a_scan_walks_the_rows_of_its_lanes<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    stage.add_all(spread(100)).await;
    let lanes = &stage.lanes[..stage.lanes.len().div_ceil(2)];
    let mut wanted: Vec<(Position, Lane)> = Vec::new();
    for row in stage.all().await.rows.into_iter().map(delivery) {
        if lanes.contains(&row.lane) {
            wanted.push((row.position, row.lane));
        }
    }
    let (mut scanned, mut after) = (Vec::new(), Position::START);
    loop {
        let reply = stage.claim(everything().scan(Page::new(lanes, after, 7))).await.scanned;
        scanned.extend(reply.iter().map(|row| (row.position, row.lane)));
        match reply[..] {
            [.., last] if reply.len() == 7 => after = last.position,
            _ => break,
        }
        assert!(scanned.len() <= MANY, "the scan never ends");
    }
    assert_eq!(scanned, wanted);
}

/// A row that does not hold a valid message is a value, and no obstacle for the others.
///
/// Passes at once if the store cannot hold such a row.
pub async fn an_unreadable_row_is_a_value<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let bad = stage.add(message("orders", "bad")).await;
    let good = stage.add(message("orders", "good")).await;
    if !stage.fixture.garble(bad).await {
        return;
    }
    let rows = stage.all().await.rows;
    let [Claimed::Unreadable(first), Claimed::Delivery(second)] = &rows[..] else {
        panic!("an unreadable row and a message expected: {rows:?}");
    };
    assert_eq!((first.id.message, second.message.id()), (bad, good));
    let reply = stage.claim(everything().fetch(&[first.id.position])).await;
    assert!(matches!(reply.rows[..], [Claimed::Unreadable(_)]), "{:?}", reply.rows);
}

/// Every answer tells the same server as the lanes' standing does.
pub async fn every_answer_tells_the_server<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let standing = stage.standing(outbox_core::WorkerId::generate()).await;
    assert_eq!(stage.all().await.server, standing.server);
}

/// A wait runs out by the store's clock; the row is claimed before and after.
pub async fn a_wait_runs_out<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let id = stage.add(message("orders", "a")).await;
    let row = stage.delivery(id).await;
    let lease = stage.lease_for(&row).await;
    let wait = Duration::from_secs(1);
    let began = Instant::now();
    stage.fail(&[failed(&row, lease, 1, Settlement::Retry(wait))]).await;
    let left = stage.delivery(id).await.state.wait;
    assert!(left > Duration::ZERO || began.elapsed() >= wait, "it does not wait");
    stage.fixture.pass(wait).await;
    assert_eq!(stage.delivery(id).await.state.wait, Duration::ZERO);
}
