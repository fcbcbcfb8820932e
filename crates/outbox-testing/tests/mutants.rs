//! Stores and brokers with one defect each, which the conformance cases must find: a case that
//! cannot fail proves nothing.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::panic::{RefUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use outbox_core::broker::{BrokerProfile, Outcomes, Outgoing, PublishError, PublishErrorKind};
use outbox_core::dead_letters::{DeadLetter, DeadLetterQuery};
use outbox_core::delivery::{Receipt, RowId, Settlement, Span};
use outbox_core::store::{
    Backlog, Claim, ClaimReply, Claimed, Delivered, KeepLeases, LaneRecord, Page, Purge, Release,
    Settle, Settled, Standing, StoreError, StoreErrorKind, StoreProfile, Swept, TakeOver,
};
use outbox_core::{
    Broker, DeadLetters, Delivery, Lane, Lease, Message, MessageId, Outbox, Position, Store,
    WorkerId, Writer, async_trait,
};
use outbox_testing::conformance::broker::{BrokerFixture, answering, recording};
use outbox_testing::conformance::store::{
    DeadLettersFixture, StoreFixture, claiming, dead_letters, leasing, purging, reference,
    settling, visibility,
};
use outbox_testing::{
    MemoryBroker, MemoryConnection, MemoryStore, MemoryTransaction, MemoryWriter, Published,
    conformance,
};

/// What is wrong with the store or the broker that the fixtures set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bug {
    // Writer
    CommitsByItself,
    // Store
    ShowsOpenRows,
    SweepsNothingLate,
    SweepsBeforeThePage,
    SaysInCommitOrder,
    ReusesPositions,
    HidesWaitingRows,
    WatchesNoWaitingRows,
    SweepsOneLane,
    ForgetsPassedRows,
    CoversTooMuch,
    InventsTheNewestRow,
    LooksAtNothing,
    TellsFetchedRowsAlone,
    IgnoresTheByteBudget,
    FailsOnUnreadableRows,
    HidesWhatAnotherReads,
    TakesTheFutureForThePast,
    ShowsSettledRowsAgain,
    DeletesByPositionOnly,
    IgnoresTheEpoch,
    FencesEarly,
    TellsNoRefusals,
    SettlesTheFirst,
    SettlesReadableRowsAlone,
    LosesDeadRows,
    BuriesInTwoSteps,
    LosesTheArchive,
    TakesLeasedLanes,
    TakesInTwoSteps,
    IgnoresTheStamp,
    KeepsTheLaterExpiry,
    KeepsALock,
    ForgetsHoldsWithTheLease,
    PurgesPendingRows,
    PurgesRetriedMessages,
    PurgesTheFuture,
    // Dead letters
    RetriesHeldRowsLast,
    DiscardsWhatWaits,
    RetriesOneOfAnId,
    RetriesInTwoSteps,
    TellsWhatItRead,
    // Broker
    StatesTooMuch,
    MixesAnswers,
    IgnoresPartitions,
    SendsOverdueMessages,
    AcknowledgesBeforeSending,
    ReversesBatches,
    TombstonesAreEmpty,
    BlamesMessagesForTheirTopic,
    LosesAnAnswer,
    NeverEnds,
    DeliversToNowhere,
}

thread_local! {
    static BUG: Cell<Option<Bug>> = const { Cell::new(None) };
    /// Claims under way, and the rows of the longest page.
    static READING: Cell<usize> = const { Cell::new(0) };
    /// Whether a call is between its steps.
    static LOCKED: Cell<bool> = const { Cell::new(false) };
    /// Who answers for the publish that came last.
    static LAST: RefCell<Option<Outcomes>> = const { RefCell::new(None) };
    static SHOWN: RefCell<Vec<Claimed>> = const { RefCell::new(Vec::new()) };
    /// By how much the clock was set back.
    static SET_BACK: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

#[track_caller]
fn assert_finds<C: Future<Output = ()>>(bug: Bug, case: impl Fn() -> C + RefUnwindSafe) {
    conformance::run(case()); // Passes without the defect.
    let began = Instant::now();
    BUG.set(Some(bug));
    let found = catch_unwind(|| conformance::run(case())).is_err();
    BUG.set(None);
    assert!(found, "{bug:?} was not found");
    // For the table of `cargo xtask seeded-bugs`.
    println!("\nbug\t{bug:?}\t{}\t{:.1}", name_of(&case), began.elapsed().as_secs_f64());
}

fn name_of<T>(_: &T) -> &'static str {
    let path = std::any::type_name::<T>();
    let path = path.split('<').next().unwrap_or(path);
    path.split_once("conformance::").map_or(path, |(_, name)| name)
}

fn has(bug: Bug) -> bool {
    BUG.get() == Some(bug)
}

#[test]
fn a_writer_that_commits_by_itself_is_found() {
    let bug = Bug::CommitsByItself;
    assert_finds(bug, visibility::a_message_of_a_rolled_back_transaction_never_appears::<Mutant>);
    assert_finds(bug, visibility::a_message_of_a_rolled_back_savepoint_never_appears::<Mutant>);
    assert_finds(bug, visibility::adding_without_an_open_transaction_is_refused::<Mutant>);
}

#[test]
fn claims_that_show_too_much_or_too_little_are_found() {
    assert_finds(
        Bug::ShowsOpenRows,
        visibility::a_message_appears_when_its_transaction_commits::<Mutant>,
    );
    assert_finds(Bug::SweepsNothingLate, visibility::a_late_commit_is_seen_by_the_sweep::<Mutant>);
    assert_finds(Bug::HidesWaitingRows, claiming::waiting_and_held_rows_are_claimed::<Mutant>);
    assert_finds(
        Bug::SweepsOneLane,
        claiming::a_sweep_lists_the_rows_of_its_spans_in_every_lane::<Mutant>,
    );
    assert_finds(
        Bug::ForgetsPassedRows,
        claiming::a_page_tells_the_rows_of_other_lanes_that_it_passed::<Mutant>,
    );
    assert_finds(Bug::CoversTooMuch, claiming::pages_read_every_row_once::<Mutant>);
    assert_finds(
        Bug::InventsTheNewestRow,
        claiming::the_newest_row_is_the_last_one_of_all::<Mutant>,
    );
    assert_finds(Bug::LooksAtNothing, visibility::an_open_row_is_seen_by_the_open_look::<Mutant>);
    assert_finds(
        Bug::CoversTooMuch,
        claiming::bounded_pages_read_every_row_of_their_lanes_once::<Mutant>,
    );
    assert_finds(
        Bug::TellsFetchedRowsAlone,
        claiming::a_row_may_be_fetched_and_on_the_page::<Mutant>,
    );
    assert_finds(
        Bug::IgnoresTheByteBudget,
        claiming::a_row_beyond_the_byte_budget_is_unread::<Mutant>,
    );
    assert_finds(
        Bug::HidesWhatAnotherReads,
        claiming::claims_at_the_same_time_show_the_same_rows::<Mutant>,
    );
    assert_finds(
        Bug::TakesTheFutureForThePast,
        claiming::a_row_from_the_clocks_future_has_no_age::<Mutant>,
    );
    assert_finds(
        Bug::ShowsSettledRowsAgain,
        claiming::a_claim_beside_a_settle_shows_a_row_whole_or_not_at_all::<Mutant>,
    );
    assert_finds(Bug::FailsOnUnreadableRows, claiming::an_unreadable_row_is_a_value::<Mutant>);
    assert_finds(
        Bug::WatchesNoWaitingRows,
        claiming::waiting_and_held_rows_are_shown_by_every_read::<Mutant>,
    );
    assert_finds(
        Bug::SweepsBeforeThePage,
        visibility::the_sweep_is_not_older_than_the_page::<Mutant>,
    );
    assert_finds(
        Bug::SaysInCommitOrder,
        visibility::rows_of_a_store_in_commit_order_appear_in_order::<Mutant>,
    );
    assert_finds(Bug::ReusesPositions, visibility::a_position_is_handed_out_once::<Mutant>);
}

#[test]
fn settlements_without_identity_or_fence_are_found() {
    assert_finds(Bug::DeletesByPositionOnly, settling::a_reused_position_is_not_deleted::<Mutant>);
    assert_finds(Bug::IgnoresTheEpoch, settling::a_stale_epoch_changes_nothing::<Mutant>);
    assert_finds(Bug::TellsNoRefusals, settling::a_failed_row_that_is_gone_is_refused::<Mutant>);
    assert_finds(Bug::ForgetsHoldsWithTheLease, settling::a_hold_outlasts_a_take_over::<Mutant>);
    assert_finds(Bug::LosesDeadRows, settling::a_dead_row_moves_to_the_dead_letters::<Mutant>);
    assert_finds(Bug::LosesTheArchive, settling::a_delivered_row_is_archived_when_asked::<Mutant>);
    assert_finds(
        Bug::FencesEarly,
        settling::a_failure_beside_a_take_over_changes_nothing_after_it::<Mutant>,
    );
    assert_finds(Bug::SettlesTheFirst, settling::large_requests_are_done_whole::<Mutant>);
    let bug = Bug::SettlesReadableRowsAlone;
    assert_finds(bug, settling::an_unreadable_row_can_be_settled::<Mutant>);
    let bug = Bug::BuriesInTwoSteps;
    assert_finds(bug, settling::a_dropped_settle_leaves_a_message_in_one_place::<Mutant>);
}

#[test]
fn leases_that_do_not_exclude_are_found() {
    assert_finds(Bug::TakesLeasedLanes, leasing::a_leased_lane_is_not_taken::<Mutant>);
    assert_finds(Bug::IgnoresTheStamp, leasing::a_take_over_needs_the_observed_stamp::<Mutant>);
    assert_finds(
        Bug::KeepsTheLaterExpiry,
        leasing::no_lease_lasts_longer_for_a_clock_that_is_set_back::<Mutant>,
    );
    assert_finds(Bug::TakesLeasedLanes, leasing::one_of_two_takers_gets_a_lane::<Mutant>);
    assert_finds(
        Bug::TakesInTwoSteps,
        leasing::of_two_takers_at_the_same_time_one_gets_a_lane::<Mutant>,
    );
    let bug = Bug::KeepsALock;
    assert_finds(bug, settling::a_dropped_release_or_purge_can_be_repeated::<Mutant>);
}

#[test]
fn a_purge_of_undelivered_rows_is_found() {
    let case = purging::purging_never_touches_what_was_not_delivered::<Mutant>;
    assert_finds(Bug::PurgesPendingRows, case);
    let case = dead_letters::purging_leaves_a_dead_message_that_is_retried::<Mutant>;
    assert_finds(Bug::PurgesRetriedMessages, case);
    let case = purging::purging_leaves_copies_from_the_clocks_future::<Mutant>;
    assert_finds(Bug::PurgesTheFuture, case);
}

#[test]
fn verbs_that_do_something_else_are_found() {
    assert_finds(
        Bug::RetriesHeldRowsLast,
        dead_letters::a_held_message_that_is_retried_keeps_its_place::<Mutant>,
    );
    assert_finds(Bug::DiscardsWhatWaits, dead_letters::verbs_ignore_other_messages::<Mutant>);
    assert_finds(
        Bug::RetriesOneOfAnId,
        dead_letters::a_verb_changes_every_message_of_an_id::<Mutant>,
    );
    let bug = Bug::RetriesInTwoSteps;
    assert_finds(bug, dead_letters::a_dropped_verb_leaves_a_message_in_one_place::<Mutant>);
    let bug = Bug::TellsWhatItRead;
    let case = dead_letters::of_two_operators_at_the_same_time_one_changes_a_message::<Mutant>;
    assert_finds(bug, case);
}

#[test]
fn stores_that_drift_from_the_one_in_memory_are_found() {
    for bug in [
        Bug::DeletesByPositionOnly,
        Bug::IgnoresTheEpoch,
        Bug::TellsNoRefusals,
        Bug::LosesDeadRows,
        Bug::TakesLeasedLanes,
        Bug::RetriesHeldRowsLast,
    ] {
        assert_finds(bug, reference::any_steps_leave_what_they_leave_in_memory::<Mutant>);
    }
}

#[test]
fn broken_brokers_are_found() {
    let bug = Bug::AcknowledgesBeforeSending;
    assert_finds(bug, answering::a_dropped_publish_keeps_its_answers::<Mutant>);
    assert_finds(Bug::LosesAnAnswer, answering::each_message_is_answered_and_has_arrived::<Mutant>);
    assert_finds(Bug::SendsOverdueMessages, answering::an_overdue_message_is_never_sent::<Mutant>);
    assert_finds(
        Bug::BlamesMessagesForTheirTopic,
        answering::an_unknown_topic_counts_no_attempt::<Mutant>,
    );
    assert_finds(Bug::DeliversToNowhere, answering::an_unknown_topic_counts_no_attempt::<Mutant>);
    assert_finds(Bug::NeverEnds, answering::a_publish_ends_within_the_undecided_time::<Mutant>);
    // Any other case fails as well, and does not hang.
    assert_finds(Bug::NeverEnds, recording::a_message_carries_its_id::<Mutant>);
    assert_finds(Bug::ReversesBatches, recording::messages_of_a_key_arrive_in_order::<Mutant>);
    assert_finds(Bug::TombstonesAreEmpty, recording::a_tombstone_is_no_empty_payload::<Mutant>);
    assert_finds(Bug::StatesTooMuch, answering::a_message_of_the_largest_size_is_taken::<Mutant>);
    let bug = Bug::MixesAnswers;
    assert_finds(bug, answering::publishes_at_the_same_time_are_answered_apart::<Mutant>);
    let bug = Bug::IgnoresPartitions;
    assert_finds(bug, recording::a_message_arrives_in_the_partition_that_it_names::<Mutant>);
}

#[derive(Debug, Clone)]
struct Mutant {
    store: MemoryStore,
    broker: MemoryBroker,
}

impl Mutant {
    async fn lanes(&self) -> Result<Vec<LaneRecord>, StoreError> {
        let worker = WorkerId::from_bytes([9; 16]);
        Ok(self.store.keep_leases(KeepLeases::new(worker, Duration::ZERO)).await?.lanes)
    }

    async fn rows(&self) -> Vec<Delivery> {
        let lanes: Vec<Lane> = (0..MemoryStore::DEFAULT_LANES.get()).map(Lane).collect();
        let page = Page::new(&lanes, Position::START, 10_000);
        let rows = self.store.claim(Claim::new(usize::MAX).page(page)).await.expect("rows").rows;
        let delivery = |row| if let Claimed::Delivery(row) = row { Some(*row) } else { None };
        rows.into_iter().filter_map(delivery).collect()
    }

    async fn add_again(&self, message: &Message) -> Result<(), StoreError> {
        let mut own = self.store.begin();
        MemoryWriter::new().write(&mut own, std::slice::from_ref(message)).await?;
        own.commit();
        Ok(())
    }
}

const EVERYWHERE: [Span; 1] = [Span::new(Position::START, Position(u64::MAX))];

#[async_trait]
impl StoreFixture for Mutant {
    type Writer = MutantWriter;
    type Transaction = MemoryTransaction<'static>;
    type Connection = Box<MemoryConnection>;

    async fn set_up() -> Self {
        tokio::time::pause();
        let broker = MemoryBroker::new();
        broker.remove_topic("unknown");
        SET_BACK.set(Duration::ZERO);
        LOCKED.set(false);
        Self { store: MemoryStore::new(), broker }
    }

    fn writer(&self) -> MutantWriter {
        MutantWriter(self.store.clone())
    }

    fn store(&self) -> Arc<dyn Store> {
        Arc::new(self.clone())
    }

    fn sees_open_rows(&self) -> bool {
        // Such a store still has to show the committed ones.
        !has(Bug::LooksAtNothing)
    }

    async fn begin(&self) -> MemoryTransaction<'static> {
        if has(Bug::ReusesPositions) {
            let next = self.rows().await.last().map_or(Position(1), |row| row.position.next());
            self.store.fail_over(next);
        }
        self.store.begin()
    }

    async fn commit(&self, transaction: MemoryTransaction<'static>) {
        transaction.commit();
    }

    async fn roll_back(&self, transaction: MemoryTransaction<'static>) {
        transaction.rollback();
    }

    async fn add_in_savepoint(
        &self,
        transaction: &mut MemoryTransaction<'static>,
        message: Message,
        release: bool,
    ) -> bool {
        let mut savepoint = transaction.begin();
        Outbox::new(self.writer()).add(&mut savepoint, message).await.expect("an add");
        match release {
            true => savepoint.commit(),
            false => savepoint.rollback(),
        }
        true
    }

    async fn connect(&self) -> Option<Box<MemoryConnection>> {
        Some(Box::new(self.store.connection()))
    }

    async fn garble(&self, message: MessageId) -> bool {
        self.store.garble(message)
    }

    async fn pass(&self, time: Duration) {
        tokio::time::advance(time + Duration::from_millis(1)).await;
    }

    async fn set_clock_back(&self, time: Duration) -> bool {
        self.store.set_clock_back(time);
        SET_BACK.set(time);
        true
    }
}

impl DeadLettersFixture for Mutant {
    fn dead_letters(&self) -> Arc<dyn DeadLetters> {
        Arc::new(self.clone())
    }
}

#[derive(Debug)]
struct MutantWriter(MemoryStore);

#[async_trait]
impl Writer for MutantWriter {
    type Transaction = MemoryConnection;

    async fn write(
        &self,
        transaction: &mut MemoryConnection,
        messages: &[Message],
    ) -> Result<(), StoreError> {
        if !has(Bug::CommitsByItself) {
            return MemoryWriter::new().write(transaction, messages).await;
        }
        let mut own = self.0.begin();
        MemoryWriter::new().write(&mut own, messages).await?;
        own.commit();
        Ok(())
    }
}

#[async_trait]
impl Store for Mutant {
    async fn open(&self) -> Result<StoreProfile, StoreError> {
        let profile = self.store.open().await?;
        Ok(if has(Bug::SaysInCommitOrder) { profile.in_commit_order() } else { profile })
    }

    async fn keep_leases(&self, mut request: KeepLeases<'_>) -> Result<Standing, StoreError> {
        if has(Bug::KeepsTheLaterExpiry) && !request.renew.is_empty() {
            request.ttl += SET_BACK.get();
        }
        let two_steps = has(Bug::TakesInTwoSteps) && !request.take.is_empty();
        if two_steps {
            let lanes = self.lanes().await?;
            let free = |take: &TakeOver| lanes[usize::from(take.lane.0)].owner.is_none();
            tokio::task::yield_now().await;
            if !request.take.iter().all(free) {
                return self.store.keep_leases(request).await;
            }
        }
        let steals = has(Bug::TakesLeasedLanes) || two_steps;
        let blind = steals || has(Bug::IgnoresTheStamp);
        if !blind || request.take.is_empty() {
            return self.store.keep_leases(request).await;
        }
        let lanes =
            self.store.keep_leases(KeepLeases::new(request.worker, request.ttl)).await?.lanes;
        for lane in &lanes {
            if let (true, Some(owner)) = (steals, lane.owner) {
                let lease = [Lease::new(lane.lane, lane.epoch)];
                self.store.release(Release::new(owner, &lease)).await?;
            }
        }
        let lanes =
            self.store.keep_leases(KeepLeases::new(request.worker, request.ttl)).await?.lanes;
        let fresh: Vec<TakeOver> = lanes.iter().map(TakeOver::of).collect();
        self.store.keep_leases(request.take(&fresh)).await
    }

    async fn claim(&self, mut request: Claim<'_>) -> Result<ClaimReply, StoreError> {
        if has(Bug::IgnoresTheByteBudget) {
            request.bytes = usize::MAX;
        }
        if has(Bug::HidesWhatAnotherReads) {
            let others = READING.replace(READING.get() + 1);
            tokio::task::yield_now().await;
            READING.set(READING.get() - 1);
            request.page = request.page.filter(|_| others == 0);
        }
        let mut reply = if has(Bug::SweepsBeforeThePage) && request.page.is_some() {
            let sweep = Claim::new(request.bytes).sweep(request.sweep);
            let swept = self.store.claim(sweep).await?.swept;
            tokio::task::yield_now().await;
            let mut reply = self.store.claim(request).await?;
            reply.swept = swept;
            reply
        } else {
            self.store.claim(request).await?
        };
        if has(Bug::WatchesNoWaitingRows) {
            reply.watched.retain(|row| row.state.wait.is_zero());
        }
        if has(Bug::ShowsSettledRowsAgain) && request.page.is_some() {
            SHOWN.with_borrow_mut(|shown| {
                if shown.len() < reply.rows.len() {
                    shown.clone_from(&reply.rows);
                }
                reply.rows.clone_from(shown);
            });
        }
        if has(Bug::TakesTheFutureForThePast) {
            for row in &mut reply.rows {
                let Claimed::Delivery(row) = row else { continue };
                row.age = row.age.max(SET_BACK.get());
            }
        }
        if has(Bug::ForgetsHoldsWithTheLease) {
            let lanes = self.lanes().await?;
            for row in &mut reply.rows {
                let Claimed::Delivery(row) = row else { continue };
                row.state.held &= lanes[usize::from(row.lane.0)].epoch == 1;
            }
        }
        if has(Bug::ShowsOpenRows) {
            let open = self.store.claim(Claim::new(0).open(&EVERYWHERE)).await?.open;
            reply.swept = open.iter().map(|position| Swept::new(*position, Lane(0), 1)).collect();
        }
        if has(Bug::SweepsNothingLate) {
            reply.swept.clear();
        }
        if has(Bug::HidesWaitingRows) {
            reply.rows.retain(|row| match row {
                Claimed::Delivery(row) => !row.state.held && row.state.wait.is_zero(),
                _ => true,
            });
        }
        if has(Bug::SweepsOneLane) {
            reply.swept.retain(|row| row.lane == Lane(0));
        }
        if has(Bug::ForgetsPassedRows) {
            reply.passed.clear();
        }
        if has(Bug::CoversTooMuch) {
            reply.covered = Position(u64::MAX);
        }
        if has(Bug::InventsTheNewestRow) && request.newest.is_some() {
            reply.newest = Some(Position(u64::MAX));
        }
        if has(Bug::LooksAtNothing) {
            reply.open.clear();
        }
        if has(Bug::TellsFetchedRowsAlone) && !request.fetch.is_empty() {
            reply.rows.retain(|row| request.fetch.contains(&row.position()));
        }
        let unreadable = |row: &Claimed| matches!(row, Claimed::Unreadable(_));
        if has(Bug::FailsOnUnreadableRows) && reply.rows.iter().any(unreadable) {
            return Err(StoreErrorKind::Other.into());
        }
        Ok(reply)
    }

    async fn settle(&self, mut request: Settle<'_>) -> Result<Settled, StoreError> {
        let (mut delivered, mut failed) = (request.delivered.to_vec(), request.failed.to_vec());
        if has(Bug::DeletesByPositionOnly) {
            for row in &mut delivered {
                let position = [row.id.position];
                let watched = self.store.claim(Claim::new(0).watch(&position)).await?.watched;
                row.id = watched.first().map_or(row.id, |row| row.id);
            }
        }
        if has(Bug::SettlesReadableRowsAlone) {
            let positions: Vec<_> = failed.iter().map(|row| row.id.position).collect();
            let rows = self.store.claim(Claim::new(usize::MAX).fetch(&positions)).await?.rows;
            if rows.iter().any(|row| matches!(row, Claimed::Unreadable(_))) {
                return Err(StoreErrorKind::Invalid.into());
            }
        }
        if has(Bug::SettlesTheFirst) {
            delivered.truncate(500);
        }
        if has(Bug::FencesEarly) && !failed.is_empty() {
            let lanes = self.lanes().await?;
            tokio::task::yield_now().await;
            let now = self.lanes().await?;
            for row in &mut failed {
                let lane = usize::from(row.lease.lane.0);
                if lanes[lane].owner.is_some() && lanes[lane].epoch == row.lease.epoch {
                    row.lease.epoch = now[lane].epoch;
                }
            }
        }
        if has(Bug::BuriesInTwoSteps) {
            for row in failed.iter().filter(|row| row.settlement == Settlement::Dead) {
                let all = self.rows().await;
                let Some(found) = all.iter().find(|all| all.position == row.id.position) else {
                    continue;
                };
                let gone = [Delivered::new(row.id, Receipt::default())];
                self.store.settle(Settle::new(&gone, &[])).await?;
                tokio::task::yield_now().await;
                self.add_again(&found.message).await?;
            }
            for row in &mut failed {
                let all = self.rows().await;
                let again = all.iter().find(|all| all.message.id() == row.id.message);
                row.id.position = again.map_or(row.id.position, |again| again.position);
            }
        }
        if has(Bug::IgnoresTheEpoch) {
            let lanes = self.lanes().await?;
            for row in &mut failed {
                row.lease.epoch = lanes[usize::from(row.lease.lane.0)].epoch;
            }
        }
        if has(Bug::LosesTheArchive) {
            request.archive = false;
        }
        let settle = Settle::new(&delivered, &failed).archive(request.archive);
        let settled = self.store.settle(settle).await?;
        if has(Bug::LosesDeadRows) {
            let dead = failed.iter().filter(|row| row.settlement == Settlement::Dead);
            let ids: Vec<MessageId> = dead.map(|row| row.id.message).collect();
            self.store.discard(&ids).await?;
        }
        Ok(if has(Bug::TellsNoRefusals) { Settled::default() } else { settled })
    }

    async fn release(&self, request: Release<'_>) -> Result<(), StoreError> {
        if has(Bug::KeepsALock) {
            if LOCKED.replace(true) {
                return Err(StoreErrorKind::Other.into());
            }
            tokio::task::yield_now().await;
            LOCKED.set(false);
        }
        self.store.release(request).await
    }

    async fn purge(&self, request: Purge) -> Result<u64, StoreError> {
        if has(Bug::PurgesRetriedMessages) {
            let lanes: Vec<Lane> = (0..MemoryStore::DEFAULT_LANES.get()).map(Lane).collect();
            let page = Page::new(&lanes, Position::START, 100);
            let rows = self.store.claim(Claim::new(1_000).page(page)).await?.rows;
            let retried = rows.iter().filter_map(|row| match row {
                Claimed::Delivery(row) if row.state.retried => Some(row),
                _ => None,
            });
            let id = |row: &Delivery| RowId::new(row.position, row.message.id());
            let all: Vec<_> =
                retried.map(|row| Delivered::new(id(row), Receipt::default())).collect();
            self.store.settle(Settle::new(&all, &[])).await?;
        }
        if has(Bug::PurgesPendingRows) {
            let lanes: Vec<Lane> = (0..MemoryStore::DEFAULT_LANES.get()).map(Lane).collect();
            let page = Page::new(&lanes, Position::START, 100);
            let rows = self.store.claim(Claim::new(0).scan(page)).await?.scanned;
            let positions: Vec<Position> = rows.iter().map(|row| row.position).collect();
            let watched = self.store.claim(Claim::new(0).watch(&positions)).await?.watched;
            let all = watched.iter().map(|row| Delivered::new(row.id, Receipt::default()));
            self.store.settle(Settle::new(&all.collect::<Vec<_>>(), &[])).await?;
        }
        if has(Bug::PurgesTheFuture) && !SET_BACK.get().is_zero() {
            return Ok(self.store.archived().len() as u64);
        }
        self.store.purge(request).await
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        self.store.backlog().await
    }
}

#[async_trait]
impl DeadLetters for Mutant {
    async fn list(&self, query: &DeadLetterQuery) -> Result<Vec<DeadLetter>, StoreError> {
        self.store.list(query).await
    }

    async fn get(&self, id: MessageId) -> Result<Option<DeadLetter>, StoreError> {
        self.store.get(id).await
    }

    async fn retry(&self, ids: &[MessageId]) -> Result<u64, StoreError> {
        if has(Bug::RetriesHeldRowsLast) {
            self.store.skip(ids).await?;
        }
        if has(Bug::TellsWhatItRead) {
            let found = self.store.get(ids[0]).await?.map_or(0, |_| 1);
            tokio::task::yield_now().await;
            self.store.retry(ids).await?;
            return Ok(found);
        }
        if has(Bug::RetriesInTwoSteps) {
            let Some(found) = self.store.get(ids[0]).await? else { return Ok(0) };
            self.store.discard(ids).await?;
            tokio::task::yield_now().await;
            self.add_again(&found.message.expect("a message")).await?;
            return Ok(1);
        }
        if has(Bug::RetriesOneOfAnId) {
            return Ok(self.store.retry(ids).await?.min(ids.len() as u64));
        }
        self.store.retry(ids).await
    }

    async fn skip(&self, ids: &[MessageId]) -> Result<u64, StoreError> {
        self.store.skip(ids).await
    }

    async fn discard(&self, ids: &[MessageId]) -> Result<u64, StoreError> {
        if has(Bug::DiscardsWhatWaits) {
            let pending = self.store.pending().into_iter().map(|message| message.id());
            let waiting = pending.filter(|id| ids.contains(id)).count();
            return Ok(self.store.discard(ids).await? + waiting as u64);
        }
        self.store.discard(ids).await
    }
}

#[async_trait]
impl BrokerFixture for Mutant {
    async fn set_up() -> Self {
        <Self as StoreFixture>::set_up().await
    }

    fn broker(&self) -> Arc<dyn Broker> {
        Arc::new(self.clone())
    }

    async fn create_topic(&self) -> String {
        format!("topic-{}", MessageId::generate())
    }

    fn unknown_topic(&self) -> Option<String> {
        Some("unknown".to_owned())
    }

    async fn published_to(&self, topic: &str) -> Vec<Published> {
        self.broker.published_to(topic)
    }
}

#[async_trait]
impl Broker for Mutant {
    fn profile(&self) -> BrokerProfile {
        let mut profile = self.broker.profile();
        if has(Bug::StatesTooMuch) {
            profile.max_message_bytes += 1_000;
        }
        profile
    }

    async fn publish(&self, mut batch: Vec<Outgoing>, outcomes: &Outcomes) {
        if has(Bug::NeverEnds) {
            std::future::pending::<()>().await;
        }
        if has(Bug::AcknowledgesBeforeSending) {
            for index in 0..batch.len() {
                outcomes.delivered(index, Receipt::default());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        for outgoing in &mut batch {
            if has(Bug::SendsOverdueMessages) {
                outgoing.not_after += Duration::from_secs(60);
            }
            let message = outgoing.delivery.message.clone();
            if has(Bug::TombstonesAreEmpty) && message.payload().is_none() {
                let empty = Message::builder(message.topic()).key("k").payload("");
                outgoing.delivery.message = empty.build().expect("a valid message");
            }
            if has(Bug::IgnoresPartitions) && message.partition().is_some() {
                let anywhere = Message::builder(message.topic());
                let anywhere = anywhere.key(message.key().unwrap_or_default()).payload("p");
                outgoing.delivery.message = anywhere.build().expect("a valid message");
            }
            if has(Bug::DeliversToNowhere) && message_is_for_nowhere(outgoing) {
                outcomes.delivered(0, Receipt::default());
            }
            if has(Bug::BlamesMessagesForTheirTopic) && message_is_for_nowhere(outgoing) {
                outcomes.failed(0, PublishErrorKind::Rejected.into());
            }
        }
        if has(Bug::ReversesBatches) {
            batch.reverse();
        }
        if has(Bug::MixesAnswers) {
            LAST.set(Some(outcomes.clone()));
            tokio::task::yield_now().await;
            let last = LAST.with_borrow(Clone::clone).expect("a publish");
            self.broker.publish(batch, &last).await;
        } else if has(Bug::LosesAnAnswer) {
            let own = Outcomes::new(batch.len(), Arc::default());
            self.broker.publish(batch, &own).await;
            for (index, _) in own.take().into_iter().skip(1) {
                outcomes.delivered(index, Receipt::default());
            }
        } else {
            self.broker.publish(batch, outcomes).await;
        }
    }

    async fn check(&self) -> Result<(), PublishError> {
        self.broker.check().await
    }

    async fn close(&self, _within: Duration) {}
}

fn message_is_for_nowhere(outgoing: &Outgoing) -> bool {
    outgoing.delivery.message.topic() == "unknown"
}
