//! Reading: what a claim shows of the rows.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Included};
use std::time::Duration;

use outbox_core::delivery::{Failure, RowId, RowState, Span};
use outbox_core::store::{Claim, ClaimReply, Claimed, Page, Swept, Unreadable, Watched};
use outbox_core::{Delivery, Position};

use super::{Row, State};

impl State {
    pub(in crate::store) fn claim(&self, request: &Claim<'_>, now: Duration) -> ClaimReply {
        let mut reply = ClaimReply::default();
        reply.server = self.server;
        let mut budget = request.bytes;
        for position in request.fetch {
            let Some(row) = self.rows.get(position) else { continue };
            if request.fetch.len() == 1 {
                budget = budget.max(row.message.size());
            }
            reply.rows.push(row.claimed(*position, &mut budget, now));
        }
        if let Some(page) = &request.page {
            self.read_page(page, &mut budget, now, &mut reply);
        }
        if let Some(above) = request.newest {
            let newest = self.rows.keys().next_back().copied();
            reply.newest = newest.filter(|position| *position > above);
        }
        for span in request.sweep {
            reply.swept.extend(within(&self.rows, *span).map(|(at, row)| row.swept(*at)));
        }
        for span in request.open {
            reply.open.extend(within(&self.rows, *span).map(|(position, _)| *position));
            if !self.in_commit_order {
                reply.open.extend(within(&self.open, *span).map(|(position, _)| *position));
            }
        }
        for position in request.watch {
            let Some(row) = self.rows.get(position) else { continue };
            let id = RowId::new(*position, row.message.id());
            reply.watched.push(Watched::new(id, row.state(now)));
        }
        if let Some(page) = &request.scan {
            let wanted = above(&self.rows, page).filter(|(_, row)| page.lanes.contains(&row.lane));
            reply.scanned = wanted.take(page.rows).map(|(at, row)| row.swept(*at)).collect();
        }
        reply
    }

    fn read_page(
        &self,
        page: &Page<'_>,
        budget: &mut usize,
        now: Duration,
        reply: &mut ClaimReply,
    ) {
        let bounded = page.through < Position(u64::MAX);
        let mut read = 0;
        reply.covered = page.after;
        for (position, row) in above(&self.rows, page) {
            if read == page.rows {
                break;
            }
            reply.covered = *position;
            if page.lanes.contains(&row.lane) {
                reply.rows.push(row.claimed(*position, budget, now));
            } else if bounded {
                continue;
            } else {
                reply.passed.push(*position);
            }
            read += 1;
        }
        reply.end = read < page.rows;
    }
}

impl Row {
    fn state(&self, now: Duration) -> RowState {
        RowState::new(self.attempts, self.revision)
            .with_held(self.died.is_some())
            .with_wait(self.available_at.saturating_sub(now))
            .with_retried(self.retried)
    }

    fn swept(&self, position: Position) -> Swept {
        Swept::new(position, self.lane, self.message.size())
    }

    fn claimed(&self, position: Position, budget: &mut usize, now: Duration) -> Claimed {
        let Some(rest) = budget.checked_sub(self.message.size()) else {
            return self.swept(position).into();
        };
        *budget = rest;
        let age = now.saturating_sub(self.added_at);
        if self.garbled {
            let id = RowId::new(position, self.message.id());
            let failure = Failure::new("unreadable", "the row does not hold a valid message");
            return Unreadable::new(id, self.lane, failure)
                .with_destination(self.message.topic(), self.message.key().map(<[u8]>::to_vec))
                .with_state(self.state(now), age)
                .into();
        }
        Delivery::new(position, self.lane, self.message.clone())
            .with_state(self.state(now))
            .with_age(age)
            .into()
    }
}

fn within(rows: &BTreeMap<Position, Row>, span: Span) -> impl Iterator<Item = (&Position, &Row)> {
    let valid = (span.first <= span.last).then_some(span.first..=span.last);
    valid.into_iter().flat_map(|span| rows.range(span))
}

fn above<'a>(
    rows: &'a BTreeMap<Position, Row>,
    page: &Page<'_>,
) -> impl Iterator<Item = (&'a Position, &'a Row)> {
    let valid = page.after < page.through;
    let range = valid.then_some((Excluded(page.after), Included(page.through)));
    range.into_iter().flat_map(|range| rows.range(range))
}
