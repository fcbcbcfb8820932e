//! What every [`Store`] promises, with its [`Writer`] and its [`DeadLetters`].

pub mod claiming;
pub mod dead_letters;
pub mod leasing;
pub mod purging;
pub mod reference;
pub mod settling;
mod stage;
pub mod visibility;

use std::ops::DerefMut;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use outbox_core::{DeadLetters, Message, MessageId, Store, Writer};

use self::stage::Stage;

/// A store under test. Each case sets up one of its own.
#[async_trait]
pub trait StoreFixture: Sized + Send + Sync + 'static {
    /// How the store is written to.
    type Writer: Writer;
    /// A transaction of the application.
    type Transaction: DerefMut<Target = <Self::Writer as Writer>::Transaction> + Send;
    /// A connection of the application without an open transaction; of a store that has no such
    /// thing, the same type as [`Transaction`](Self::Transaction).
    type Connection: DerefMut<Target = <Self::Writer as Writer>::Transaction> + Send;

    /// An empty store that no other case uses.
    async fn set_up() -> Self;

    /// A writer to the store.
    fn writer(&self) -> Self::Writer;

    /// The store.
    fn store(&self) -> Arc<dyn Store>;

    /// Whether [`Claim::open`](outbox_core::store::Claim::open) shows rows of transactions that
    /// are still open. A store whose rows become visible in order need not.
    fn sees_open_rows(&self) -> bool;

    /// Begins a transaction. Where one has to wait for the end of another, this waits without blocking
    /// its thread.
    async fn begin(&self) -> Self::Transaction;

    /// Commits it.
    async fn commit(&self, transaction: Self::Transaction);

    /// Rolls it back.
    async fn roll_back(&self, transaction: Self::Transaction);

    /// Adds a message within a savepoint of this transaction, and releases the savepoint or rolls
    /// back to it. Answers `false`, having added nothing, if transactions have no savepoints.
    async fn add_in_savepoint(
        &self,
        transaction: &mut Self::Transaction,
        message: Message,
        release: bool,
    ) -> bool;

    /// A connection without an open transaction; `None` if whoever has a
    /// [`Writer::Transaction`] is in a transaction, so that adding outside of one does not compile.
    async fn connect(&self) -> Option<Self::Connection>;

    /// Makes the committed row of this message unreadable, as if it had been written around the
    /// API. Answers `false` if the store cannot hold such a row.
    async fn garble(&self, message: MessageId) -> bool;

    /// Lets this much time pass by the store's clock, and a little more: a real server is slept
    /// for.
    async fn pass(&self, time: Duration);

    /// Sets the store's clock back by this much or, where a test cannot, makes every time that is
    /// written in the store so much later: it comes to the same. Answers `false` if the test can do
    /// neither. To a store, a clock that is set forward is time that passes.
    async fn set_clock_back(&self, time: Duration) -> bool;
}

/// A store under test that has [`DeadLetters`].
pub trait DeadLettersFixture: StoreFixture {
    /// The operator's side of the store.
    fn dead_letters(&self) -> Arc<dyn DeadLetters>;
}

/// Emits one test for every promise of [`Store`] and [`Writer`], given a [`StoreFixture`].
#[macro_export]
macro_rules! store_conformance {
    ($fixture:ty) => {
        $crate::__conformance! { $fixture, store::visibility {
            a_message_appears_when_its_transaction_commits,
            a_message_of_a_rolled_back_transaction_never_appears,
            a_message_of_a_rolled_back_savepoint_never_appears,
            messages_stand_in_the_order_in_which_they_were_added,
            adding_without_an_open_transaction_is_refused,
            a_message_is_read_as_it_was_written,
            a_key_is_in_one_lane,
            a_late_commit_is_seen_by_the_sweep,
            the_sweep_is_not_older_than_the_page,
            rows_of_a_store_in_commit_order_appear_in_order,
            a_position_is_handed_out_once,
            an_open_row_is_seen_by_the_open_look,
        } }
        $crate::__conformance! { $fixture, store::claiming {
            a_page_is_ascending_and_above_its_start,
            the_newest_row_is_the_last_one_of_all,
            pages_read_every_row_once,
            a_page_tells_the_rows_of_other_lanes_that_it_passed,
            a_bounded_page_ends_at_its_bound,
            bounded_pages_read_every_row_of_their_lanes_once,
            claiming_changes_nothing,
            claims_at_the_same_time_show_the_same_rows,
            a_claim_beside_a_settle_shows_a_row_whole_or_not_at_all,
            waiting_and_held_rows_are_claimed,
            waiting_and_held_rows_are_shown_by_every_read,
            a_row_tells_its_age,
            a_row_from_the_clocks_future_has_no_age,
            a_row_beyond_the_byte_budget_is_unread,
            a_row_fetched_alone_is_returned_whole,
            a_fetch_returns_the_rows_that_exist,
            a_row_may_be_fetched_and_on_the_page,
            a_watch_tells_the_state_of_the_rows_that_exist,
            a_sweep_lists_the_rows_of_its_spans_in_every_lane,
            a_scan_walks_the_rows_of_its_lanes,
            an_unreadable_row_is_a_value,
            every_answer_tells_the_server,
            a_wait_runs_out,
        } }
        $crate::__conformance! { $fixture, store::leasing {
            opening_is_repeatable,
            a_free_lane_is_taken_under_the_next_epoch,
            only_the_wanted_lanes_are_taken,
            a_leased_lane_is_not_taken,
            an_expired_lane_is_taken_under_the_next_epoch,
            a_renewed_lease_does_not_expire,
            no_lease_lasts_longer_for_a_clock_that_is_set_back,
            an_expired_lease_that_nobody_took_is_renewed,
            only_the_owner_renews_and_only_under_its_epoch,
            a_take_over_needs_the_observed_stamp,
            one_of_two_takers_gets_a_lane,
            of_two_takers_at_the_same_time_one_gets_a_lane,
            a_released_lane_is_taken_at_once,
            releasing_what_is_not_held_changes_nothing,
            registered_workers_are_told,
            absent_workers_are_forgotten_and_lanes_are_not,
        } }
        $crate::__conformance! { $fixture, store::settling {
            a_delivered_row_goes_away,
            settling_a_delivered_row_again_is_harmless,
            a_reused_position_is_not_deleted,
            a_failure_of_another_message_is_refused,
            a_delivered_row_is_archived_when_asked,
            a_retry_records_attempts_and_wait,
            a_failure_leaves_the_age_of_a_row,
            a_held_row_stays_in_its_place,
            a_hold_outlasts_a_take_over,
            a_dead_row_moves_to_the_dead_letters,
            a_stale_epoch_changes_nothing,
            a_failure_beside_a_take_over_changes_nothing_after_it,
            a_released_lease_is_refused,
            an_expired_lease_that_nobody_took_still_counts,
            the_lease_of_another_lane_is_refused,
            a_row_that_changed_since_it_was_read_is_refused,
            a_failed_row_that_is_gone_is_refused,
            one_settle_holds_rows_of_every_kind,
            an_unreadable_row_can_be_settled,
            large_requests_are_done_whole,
            settling_nothing_is_harmless,
            a_dropped_call_is_in_nobodys_way,
            a_dropped_settle_leaves_a_message_in_one_place,
            a_dropped_release_or_purge_can_be_repeated,
        } }
        $crate::__conformance! { $fixture, store::purging {
            purging_deletes_at_most_the_limit,
            purging_leaves_younger_copies,
            purging_leaves_copies_from_the_clocks_future,
            purging_never_touches_what_was_not_delivered,
            the_backlog_of_an_empty_store_is_empty,
            the_backlog_counts_what_waits,
            the_oldest_age_leaves_held_keys_out,
        } }
    };
}

/// Emits one test for every promise of [`DeadLetters`], given a [`DeadLettersFixture`].
#[macro_export]
macro_rules! dead_letters_conformance {
    ($fixture:ty) => {
        $crate::__conformance! { $fixture, store::dead_letters {
            a_dead_message_is_kept_in_full,
            held_and_dead_messages_are_listed,
            a_listing_can_be_narrowed,
            a_listing_goes_on_behind_a_cursor,
            verbs_ignore_other_messages,
            a_held_message_that_is_retried_keeps_its_place,
            a_decision_from_before_a_verb_is_refused,
            a_dead_message_that_is_retried_goes_last,
            purging_leaves_a_dead_message_that_is_retried,
            a_retried_message_can_die_again,
            a_held_message_that_is_skipped_is_dead,
            a_verb_changes_every_message_of_an_id,
            discarded_messages_are_gone,
            of_two_operators_at_the_same_time_one_changes_a_message,
            a_dropped_verb_leaves_a_message_in_one_place,
            an_unreadable_row_can_be_operated_on,
        } }
        $crate::__conformance! { $fixture, store::reference {
            any_steps_leave_what_they_leave_in_memory,
        } }
    };
}
