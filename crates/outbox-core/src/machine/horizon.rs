//! What of the table was seen: how far the pages reached, and which ids below were never seen.
//!
//! Ids are handed out at insert and become visible at commit, so an id that a page passed without
//! seeing it may still appear. Such holes are swept by every claim until they are older than the
//! grace time. Then they are looked at, open transactions included, and go unless one shows them.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::Time;
use crate::delivery::{Position, Span};
use crate::seeded::seeded;

/// More spans than this are merged into coarser ones for a sweep.
const MAX_SPANS: usize = 400;
/// So often within the grace time the newest position is taken down.
const KNOWN_PER_GRACE: u32 = 8;
/// However short the grace time is: it is asked for when no page may be read, and costs a query.
const SOONEST: Duration = Duration::from_millis(250);
/// Old holes so near to each other are looked at together.
const NEAR: u64 = 64;
/// So often rows of transactions that are open for long are looked at. In between they are swept, so
/// that they are found as soon as they are committed: this is how soon a rollback is noticed.
const SHOWN_EVERY: Duration = Duration::from_secs(1);
/// A look lists so many ids between holes at most.
const MAX_BETWEEN: u64 = 20_000;

#[derive(Debug, Clone, Default)]
pub(super) struct Horizon {
    position: Position,
    holes: BTreeMap<Position, Hole>,
    /// Positions that were known to be handed out, each with the time since when; both ascend.
    known: VecDeque<(Position, Time)>,
    /// When the newest position is worth asking for again.
    know_at: Time,
}

#[derive(Debug, Clone, Copy)]
struct Hole {
    last: Position,
    /// When the hole is older than the grace time.
    until: Time,
    /// Whether a look showed a row here, of a transaction that was perhaps still open.
    shown: bool,
}

impl Hole {
    fn is_old(&self, now: Time) -> bool {
        self.until <= now
    }
}

impl Horizon {
    /// How far the pages reached.
    pub(super) fn position(&self) -> Position {
        self.position
    }

    pub(super) fn hole_count(&self) -> usize {
        self.holes.len()
    }

    /// Takes in a page: its visible positions, ascending.
    ///
    /// A hole is at least as old as any larger id that is known to have been handed out. By our own
    /// clock: that of the store may step while an insert is under way.
    pub(super) fn pass(&mut self, page: &[Position], now: Time, grace: Duration) {
        for position in page {
            let first = self.position.next();
            if first < *position {
                let last = position.previous();
                let until = self.known_since(last).unwrap_or(now) + grace;
                self.holes.insert(first, Hole { last, until, shown: false });
            }
            self.position = self.position.max(*position);
        }
    }

    /// When the newest position is worth asking for.
    pub(super) fn know_at(&self) -> Time {
        self.know_at
    }

    /// The newest position is asked for, or was told.
    pub(super) fn asked(&mut self, now: Time, grace: Duration) {
        self.know_at = now + (grace / KNOWN_PER_GRACE).max(SOONEST);
    }

    /// Takes in that this position was handed out: a backlog is passed long after it was written, and
    /// its holes are not waited for once they are known to be older than the grace time.
    pub(super) fn know(&mut self, position: Position, now: Time, grace: Duration) {
        self.asked(now, grace);
        let is_news = self.known.back().is_none_or(|(last, since)| {
            position > *last && now >= *since + grace / KNOWN_PER_GRACE
        });
        if is_news {
            self.known.push_back((position, now));
        }
        while self.known.get(1).is_some_and(|(_, since)| *since + grace <= now) {
            self.known.pop_front();
        }
    }

    fn known_since(&self, position: Position) -> Option<Time> {
        let below = self.known.partition_point(|(known, _)| *known < position);
        let since = self.known.get(below).map(|(_, since)| *since);
        if seeded!("a-backlog-is-old") { since.map(|_| Time::ZERO) } else { since }
    }

    /// Takes in that every row up to here was shown, and that none will appear late.
    pub(super) fn jump(&mut self, position: Position) {
        self.position = self.position.max(position);
    }

    /// Whether this position was passed without being seen, and may still appear.
    pub(super) fn is_hole(&self, position: Position) -> bool {
        self.hole_at(position).is_some()
    }

    fn hole_at(&self, position: Position) -> Option<(Position, Hole)> {
        let (first, hole) = self.holes.range(..=position).next_back()?;
        (hole.last >= position).then_some((*first, *hole))
    }

    /// Marks a position as seen.
    pub(super) fn see(&mut self, position: Position) {
        let Some((first, hole)) = self.hole_at(position) else { return };
        self.holes.remove(&first);
        if first < position {
            self.holes.insert(first, Hole { last: position.previous(), ..hole });
        }
        if position < hole.last {
            self.holes.insert(position.next(), hole);
        }
    }

    /// The spans that a sweep must cover. What the same claim looks at need not be swept: a look
    /// shows all that a sweep would. Where it shows a row, its claim does not count. So once a row of
    /// a transaction that is open for long was shown, everything is swept until there is none: its
    /// next rows are about to be old, page by page.
    pub(super) fn unswept(&self, looked_at: &[Span], now: Time) -> Vec<Span> {
        let is_looked_at = |first: Position, hole: &Hole| {
            let after = looked_at.partition_point(|span| span.first <= first);
            hole.is_old(now) && after > 0 && looked_at[after - 1].contains(first)
        };
        let shown = self.holes.values().any(|hole| hole.shown);
        let holes = self.holes.iter().filter(|(first, hole)| shown || !is_looked_at(**first, hole));
        merge(holes.map(|(first, hole)| Span::new(*first, hole.last)).collect())
    }

    /// Where to look for open transactions: at the holes older than the grace time, which go unless
    /// one shows them. Neighbours are looked at as one span, known rows between them included: beside
    /// other relays, which delete rows that this one has yet to pass, holes come by the thousand.
    pub(super) fn aged(&self, now: Time) -> Vec<Span> {
        let mut spans: Vec<Span> = Vec::new();
        let mut between = 0;
        for (first, hole) in self.holes.iter().filter(|(_, hole)| hole.is_old(now)) {
            let full = spans.len() == MAX_SPANS;
            match spans.last_mut() {
                Some(span) if first.0 - span.last.0 <= NEAR && between < MAX_BETWEEN => {
                    between += first.0 - span.last.0;
                    span.last = hole.last;
                }
                _ if full => break,
                _ => spans.push(Span::new(*first, hole.last)),
            }
        }
        spans
    }

    /// Takes in what a look showed that was asked for at `asked`: the holes in these spans that were
    /// older than the grace time go, except for the positions that were shown: these are looked at
    /// again after a while, and swept by every claim. Tells whether one of them was not in `swept`,
    /// the spans that the same claim swept, so that its row may be committed.
    pub(super) fn close(
        &mut self,
        spans: &[Span],
        swept: &[Span],
        shown: &[Position],
        asked: Time,
    ) -> bool {
        let mut closed: Vec<(Position, Hole)> = Vec::new();
        for span in spans {
            let inside = self.holes.range(span.first..=span.last);
            let old = inside.filter(|(_, hole)| hole.is_old(asked));
            closed.extend(old.map(|(first, hole)| (*first, *hole)));
        }
        for (first, _) in &closed {
            self.holes.remove(first);
        }
        let is_in = |spans: &[Span], position: Position| {
            let after = spans.partition_point(|span| span.first <= position);
            after > 0 && spans[after - 1].contains(position)
        };
        let mut kept: Vec<Span> = Vec::new();
        let mut unswept = false;
        for position in shown.iter().copied() {
            let after = closed.partition_point(|(first, _)| *first <= position);
            if after > 0 && position <= closed[after - 1].1.last {
                unswept |= !is_in(swept, position);
                match kept.last_mut() {
                    Some(span) if span.last.next() == position => span.last = position,
                    _ => kept.push(Span::new(position, position)),
                }
            }
        }
        let until = asked + SHOWN_EVERY;
        let kept = kept.into_iter();
        self.holes
            .extend(kept.map(|span| (span.first, Hole { last: span.last, until, shown: true })));
        unswept
    }
}

/// Merges the closest neighbours until few enough spans are left. A coarser sweep lists more rows
/// that are known already; it never misses one.
fn merge(mut spans: Vec<Span>) -> Vec<Span> {
    if spans.len() <= MAX_SPANS {
        return spans;
    }
    let mut gaps: Vec<u64> =
        spans.windows(2).map(|pair| pair[1].first.0 - pair[0].last.0).collect();
    let excess = spans.len() - MAX_SPANS;
    let (_, &mut widest, _) = gaps.select_nth_unstable(excess - 1);
    spans.dedup_by(|next, kept| {
        let close = next.first.0 - kept.last.0 <= widest;
        if close {
            kept.last = next.last;
        }
        close
    });
    spans
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(10);
    const NOW: Time = Duration::from_secs(100);

    fn page(ids: &[u64]) -> Vec<Position> {
        ids.iter().map(|id| Position(*id)).collect()
    }

    /// Passes a page whose ids were known to be handed out a grace time ago.
    fn pass_old(horizon: &mut Horizon, ids: &[u64]) {
        horizon.know(Position(ids[ids.len() - 1]), NOW - GRACE, GRACE);
        horizon.pass(&page(ids), NOW, GRACE);
    }

    fn spans(horizon: &Horizon) -> Vec<(u64, u64)> {
        horizon.unswept(&[], NOW).iter().map(|span| (span.first.0, span.last.0)).collect()
    }

    #[test]
    fn ids_that_a_page_passes_without_seeing_them_are_holes() {
        let mut horizon = Horizon::default();
        horizon.pass(&page(&[3, 4, 8]), NOW, GRACE);
        assert_eq!(spans(&horizon), [(1, 2), (5, 7)]);
        assert_eq!(horizon.position(), Position(8));
        horizon.pass(&page(&[9]), NOW, GRACE);
        assert_eq!(spans(&horizon), [(1, 2), (5, 7)]);
    }

    #[test]
    fn a_seen_id_splits_its_hole() {
        let mut horizon = Horizon::default();
        horizon.pass(&page(&[10]), NOW, GRACE);
        for seen in [5, 1, 9, 20, 5] {
            horizon.see(Position(seen));
        }
        assert_eq!(spans(&horizon), [(2, 4), (6, 8)]);
    }

    #[test]
    fn a_hole_is_as_old_as_the_first_larger_id_that_was_known() {
        let mut horizon = Horizon::default();
        horizon.know(Position(4), NOW - GRACE * 3, GRACE);
        horizon.know(Position(9), NOW - GRACE / 2, GRACE);
        horizon.pass(&page(&[2, 4, 6, 10, 12]), NOW, GRACE);
        let aged = |now| {
            let spans = horizon.aged(now);
            spans.iter().map(|span| (span.first.0, span.last.0)).collect::<Vec<_>>()
        };
        assert_eq!(aged(NOW), [(1, 3)]);
        assert_eq!(aged(NOW + GRACE / 2), [(1, 9)]);
        assert_eq!(aged(NOW + GRACE - Duration::from_nanos(1)), [(1, 9)]);
        assert_eq!(aged(NOW + GRACE), [(1, 11)]);
    }

    #[test]
    fn a_few_of_the_newest_positions_are_kept_and_the_last_that_is_old_enough() {
        let mut horizon = Horizon::default();
        let mut asked = 0;
        for second in 0..=100 {
            let now = Duration::from_secs(second);
            if horizon.know_at() <= now {
                asked += 1;
                horizon.know(Position(second * 10), now, GRACE);
            }
            assert!(horizon.known.len() <= 1 + KNOWN_PER_GRACE as usize, "{:?}", horizon.known);
        }
        assert_eq!(asked, 51, "every two seconds");
        let old = horizon.known.iter().filter(|(_, since)| *since + GRACE <= NOW);
        assert_eq!(old.count(), 1, "{:?}", horizon.known);
    }

    #[test]
    fn closing_keeps_what_is_still_open() {
        let mut horizon = Horizon::default();
        pass_old(&mut horizon, &[10]);
        let aged = horizon.aged(NOW);
        horizon.see(Position(4));
        horizon.close(&aged, &[], &[Position(7)], NOW);
        assert_eq!(spans(&horizon), [(7, 7)]);
        assert_eq!(horizon.aged(NOW + SHOWN_EVERY / 2), [], "it was just looked at");
        let later = NOW + SHOWN_EVERY;
        horizon.close(&horizon.aged(later), &[], &[], later);
        assert_eq!(spans(&horizon), []);
    }

    #[test]
    fn what_is_looked_at_is_swept_only_where_a_look_showed_a_row() {
        let mut horizon = Horizon::default();
        pass_old(&mut horizon, &[10, 20]);
        horizon.pass(&page(&[30]), NOW, GRACE);
        let looked_at = horizon.aged(NOW);
        let swept = |horizon: &Horizon, looked_at: &[Span]| {
            let spans = horizon.unswept(looked_at, NOW);
            spans.iter().map(|span| (span.first.0, span.last.0)).collect::<Vec<_>>()
        };
        assert_eq!(swept(&horizon, &looked_at), [(21, 29)]);
        assert_eq!(swept(&horizon, &looked_at[..0]), [(1, 9), (11, 19), (21, 29)]);
        assert!(horizon.close(&looked_at, &[], &[10, 15].map(Position), NOW), "15 was not swept");
        let later = NOW + GRACE;
        let (all, looked_at) = (horizon.unswept(&[], later), horizon.aged(later));
        assert_eq!(swept(&horizon, &looked_at), [(15, 15), (21, 29)], "others may be open as well");
        let shown = [15, 25].map(Position);
        assert!(!horizon.close(&looked_at, &all, &shown, later), "they were");
    }

    #[test]
    fn rows_of_a_long_transaction_that_lie_side_by_side_are_one_hole() {
        let mut horizon = Horizon::default();
        pass_old(&mut horizon, &[5_000, 6_000]);
        let shown: Vec<_> = (1_000..4_000).chain(5_500..5_600).map(Position).collect();
        horizon.close(&horizon.aged(NOW), &[], &shown, NOW);
        assert_eq!(spans(&horizon), [(1_000, 3_999), (5_500, 5_599)]);
        assert_eq!(horizon.hole_count(), 2);
    }

    #[test]
    fn a_look_closes_no_hole_between_the_old_ones_and_takes_no_row_for_a_hole() {
        let mut horizon = Horizon::default();
        pass_old(&mut horizon, &[2, 4]);
        horizon.pass(&page(&[6, 8]), NOW, GRACE);
        horizon.holes.insert(Position(7), Hole { last: Position(7), until: NOW, shown: false });
        let looked_at = horizon.aged(NOW);
        assert_eq!(looked_at, [Span::new(Position(1), Position(7))]);
        horizon.close(&looked_at, &[], &[2, 3, 4, 8].map(Position), NOW);
        assert_eq!(spans(&horizon), [(3, 3), (5, 5)]);
    }

    #[test]
    fn the_old_holes_of_a_page_that_others_emptied_go_by_one_look() {
        let mut horizon = Horizon::default();
        let rows: Vec<_> = (1..=2_000).map(|n| n * 3).collect();
        pass_old(&mut horizon, &rows);
        assert_eq!(horizon.hole_count(), 2_000);
        horizon.close(&horizon.aged(NOW), &[], &[], NOW);
        assert_eq!(horizon.hole_count(), 0);
    }

    #[test]
    fn many_holes_are_swept_as_coarser_spans_that_cover_them_all() {
        let mut horizon = Horizon::default();
        let rows: Vec<_> = (1..=3000).map(|n| n * 2 + n / 100 * 50).collect();
        horizon.pass(&page(&rows), NOW, GRACE);
        let exact: Vec<Position> = horizon.holes.keys().copied().collect();
        let merged = horizon.unswept(&[], NOW);
        assert!(merged.len() <= MAX_SPANS, "{}", merged.len());
        assert!(exact.iter().all(|hole| merged.iter().any(|span| span.contains(*hole))));
    }
}
