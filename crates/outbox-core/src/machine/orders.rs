//! What happens to the machine, and what it asks for.

use std::sync::Arc;
use std::time::Duration;

use super::Time;
use crate::broker::{Outcome, PublishErrorKind};
use crate::delivery::{Delivery, Lane, Lease, Position, Span};
use crate::store::{
    Backlog, Claim, ClaimReply, Delivered, Failed, Page, Purge, Settle, Settled, Standing,
    StoreErrorKind, TakeOver,
};
use crate::wake::Urgency;

/// Something that happened.
#[derive(Debug)]
#[non_exhaustive]
pub enum Input {
    /// A keep was answered.
    Kept(Result<Standing, StoreErrorKind>),
    /// A claim was answered.
    Claimed(Result<ClaimReply, StoreErrorKind>),
    /// Messages of a batch were answered, by index.
    Answered(u64, Vec<(usize, Outcome)>),
    /// A publish ended: what was not answered is unknown.
    PublishEnded(u64),
    /// A settle was answered.
    Settled(u64, Result<Settled, StoreErrorKind>),
    /// A release was answered.
    Released(Result<(), StoreErrorKind>),
    /// The broker was checked.
    Checked(Result<(), PublishErrorKind>),
    /// A purge was answered.
    Purged(Result<u64, StoreErrorKind>),
    /// The backlog was counted.
    Counted(Result<Backlog, StoreErrorKind>),
    /// The broker was closed.
    Closed,
    /// A writer of this process added or committed something.
    Rung(Urgency),
    /// The user wants the dispatcher to stop.
    ShutDown,
}

/// Something to do. At most one keep, claim, release and chore is out at a time.
#[derive(Debug)]
#[non_exhaustive]
pub enum Action {
    /// Keep leases.
    Keep(KeepOrder),
    /// Read rows.
    Claim(Arc<ClaimOrder>),
    /// Publish a batch, each message no later than its time.
    Publish(u64, Vec<(Box<Delivery>, Time)>),
    /// Settle rows.
    Settle(u64, Arc<SettleOrder>),
    /// Give leases back; `true` when the worker leaves.
    Release(Vec<Lease>, bool),
    /// Check the broker.
    Check,
    /// Purge the archive.
    Purge(Purge),
    /// Count the backlog.
    Count,
    /// Close the broker within this time.
    Close(Duration),
    /// Stop: everything is done.
    Stop,
}

/// A keep, as owned values.
#[derive(Debug, Clone)]
pub struct KeepOrder {
    /// Whether this worker makes progress.
    pub healthy: bool,
    /// The leases to renew.
    pub renew: Vec<Lease>,
    /// The lanes to take.
    pub take: Vec<TakeOver>,
}

/// A claim, as owned values.
#[derive(Debug, Default)]
pub struct ClaimOrder {
    pub(super) lanes: Vec<Lane>,
    pub(super) page: Option<PageOrder>,
    pub(super) sweep: Vec<Span>,
    pub(super) newest: Option<Position>,
    pub(super) open: Vec<Span>,
    pub(super) fetch: Vec<Position>,
    pub(super) watch: Vec<Position>,
    pub(super) scan: Option<PageOrder>,
    pub(super) bytes: usize,
}

#[derive(Debug, Clone)]
pub(super) struct PageOrder {
    pub(super) lanes: Vec<Lane>,
    pub(super) after: Position,
    pub(super) through: Position,
    pub(super) rows: usize,
    pub(super) catch_up: bool,
}

impl PageOrder {
    fn request(&self) -> Page<'_> {
        let page = Page::new(&self.lanes, self.after, self.rows);
        if self.through == Position(u64::MAX) { page } else { page.through(self.through) }
    }
}

impl ClaimOrder {
    /// Whether it sweeps only, a part of what there is to sweep.
    pub(super) fn is_part(&self) -> bool {
        self.page.is_none() && self.fetch.is_empty() && !self.sweep.is_empty()
    }

    /// The claim as the store takes it.
    pub fn request(&self) -> Claim<'_> {
        let mut claim = Claim::new(self.bytes)
            .sweep(&self.sweep)
            .newest(self.newest)
            .open(&self.open)
            .fetch(&self.fetch)
            .watch(&self.watch);
        if let Some(page) = &self.page {
            claim = claim.page(page.request());
        }
        if let Some(scan) = &self.scan {
            claim = claim.scan(scan.request());
        }
        claim
    }
}

/// A settle, as owned values.
#[derive(Debug, Clone, Default)]
pub struct SettleOrder {
    pub(super) delivered: Vec<Delivered>,
    pub(super) failed: Vec<Failed>,
    pub(super) archive: bool,
    pub(super) repeated: bool,
}

impl SettleOrder {
    /// The settle as the store takes it.
    pub fn request(&self) -> Settle<'_> {
        let settle = Settle::new(&self.delivered, &self.failed).archive(self.archive);
        settle.repeated(self.repeated)
    }
}
