//! What of the table was seen: how far the pages reached, and which ids below were never seen.
//!
//! Ids are handed out at insert and become visible at commit, so an id that a page passed without
//! seeing it may still appear. Such holes are swept by every claim until they are older than the
//! grace time and no open transaction shows them.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Time;
use crate::delivery::{Position, Span};

/// More spans than this are merged into coarser ones for a sweep.
const MAX_SPANS: usize = 400;
/// Old holes so near to each other are looked at together.
const NEAR: u64 = 64;
/// A look lists so many ids between holes at most.
const MAX_BETWEEN: u64 = 20_000;

#[derive(Debug, Clone, Default)]
pub(super) struct Horizon {
    position: Position,
    holes: BTreeMap<Position, Hole>,
    /// When a page last showed that nothing visible lies above.
    ended: Option<Time>,
}

#[derive(Debug, Clone, Copy)]
struct Hole {
    last: Position,
    /// When the hole is older than the grace time.
    until: Time,
}

impl Horizon {
    /// How far the pages reached.
    pub(super) fn position(&self) -> Position {
        self.position
    }

    pub(super) fn hole_count(&self) -> usize {
        self.holes.len()
    }

    /// Takes in a page: its visible positions ascending, each with the row's age where known.
    ///
    /// A hole is at least as old as any row with a larger id; so those of a backlog are not waited
    /// for. But ages are by the store's clock, which may step while an insert is under way. What
    /// appeared after a page had come to the end is taken for no older than that, by our own clock.
    pub(super) fn pass(&mut self, page: &[(Position, Duration)], now: Time, grace: Duration) {
        let credible = self.ended.map_or(Duration::MAX, |ended| now.saturating_sub(ended));
        let mut oldest_above = Duration::ZERO;
        let mut holes = Vec::new();
        for index in (0..page.len()).rev() {
            let (position, age) = page[index];
            oldest_above = oldest_above.max(age.min(credible));
            let below = if index == 0 { self.position } else { page[index - 1].0 };
            if below.next() < position {
                let until = now + grace.saturating_sub(oldest_above);
                holes.push((below.next(), Hole { last: position.previous(), until }));
            }
        }
        self.holes.extend(holes);
        if let Some((last, _)) = page.last() {
            self.position = self.position.max(*last);
        }
    }

    /// Takes in that a page showed all that was visible.
    pub(super) fn end(&mut self, now: Time) {
        self.ended = Some(now);
    }

    /// Takes in that every row up to here was shown, and that none will appear late.
    pub(super) fn jump(&mut self, position: Position) {
        self.position = self.position.max(position);
    }

    /// Marks a position as seen.
    pub(super) fn see(&mut self, position: Position) {
        let Some((&first, &hole)) = self.holes.range(..=position).next_back() else { return };
        if hole.last < position {
            return;
        }
        self.holes.remove(&first);
        if first < position {
            self.holes.insert(first, Hole { last: position.previous(), ..hole });
        }
        if position < hole.last {
            self.holes.insert(position.next(), hole);
        }
    }

    /// The spans that a sweep must cover.
    pub(super) fn spans(&self) -> Vec<Span> {
        merge(self.holes.iter().map(|(first, hole)| Span::new(*first, hole.last)).collect())
    }

    /// Where to look for open transactions: at the holes older than the grace time, which go unless
    /// one shows them. Neighbours are looked at as one span, known rows between them included: beside
    /// other relays, which delete rows that this one has yet to pass, holes come by the thousand.
    pub(super) fn aged(&self, now: Time) -> Vec<Span> {
        let mut spans: Vec<Span> = Vec::new();
        let mut between = 0;
        for (first, hole) in self.holes.iter().filter(|(_, hole)| hole.until <= now) {
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
    /// older than the grace time go, except for the positions that are still open.
    pub(super) fn close(&mut self, spans: &[Span], open: &[Position], asked: Time) {
        let mut closed: Vec<Span> = Vec::new();
        for span in spans {
            let inside = self.holes.range(span.first..=span.last);
            let aged = inside.filter(|(_, hole)| hole.until <= asked);
            closed.extend(aged.map(|(first, hole)| Span::new(*first, hole.last)));
        }
        for span in &closed {
            self.holes.remove(&span.first);
        }
        for position in open {
            let after = closed.partition_point(|span| span.first <= *position);
            if after > 0 && closed[after - 1].contains(*position) {
                self.holes.insert(*position, Hole { last: *position, until: asked });
            }
        }
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

    fn page(rows: &[(u64, u64)]) -> Vec<(Position, Duration)> {
        rows.iter().map(|(id, age)| (Position(*id), Duration::from_secs(*age))).collect()
    }

    fn spans(horizon: &Horizon) -> Vec<(u64, u64)> {
        horizon.spans().iter().map(|span| (span.first.0, span.last.0)).collect()
    }

    #[test]
    fn ids_that_a_page_passes_without_seeing_them_are_holes() {
        let mut horizon = Horizon::default();
        horizon.pass(&page(&[(3, 0), (4, 0), (8, 0)]), NOW, GRACE);
        assert_eq!(spans(&horizon), [(1, 2), (5, 7)]);
        assert_eq!(horizon.position(), Position(8));
        horizon.pass(&page(&[(9, 0)]), NOW, GRACE);
        assert_eq!(spans(&horizon), [(1, 2), (5, 7)]);
    }

    #[test]
    fn a_seen_id_splits_its_hole() {
        let mut horizon = Horizon::default();
        horizon.pass(&page(&[(10, 0)]), NOW, GRACE);
        for seen in [5, 1, 9, 20, 5] {
            horizon.see(Position(seen));
        }
        assert_eq!(spans(&horizon), [(2, 4), (6, 8)]);
    }

    #[test]
    fn a_hole_is_as_old_as_the_oldest_row_above_it() {
        let mut horizon = Horizon::default();
        horizon.pass(&page(&[(2, 1), (4, 60), (6, 2)]), NOW, GRACE);
        let aged: Vec<_> =
            horizon.aged(NOW).iter().map(|span| (span.first.0, span.last.0)).collect();
        assert_eq!(aged, [(1, 3)], "the row of 60 s is above both");
        let aged: Vec<_> =
            horizon.aged(NOW + GRACE).iter().map(|span| (span.first.0, span.last.0)).collect();
        assert_eq!(aged, [(1, 5)]);
    }

    #[test]
    fn what_appears_after_the_end_is_no_older_than_that_whatever_the_clock_of_the_store_says() {
        let mut horizon = Horizon::default();
        horizon.end(NOW - GRACE / 2);
        horizon.pass(&page(&[(2, 3_600)]), NOW, GRACE);
        assert_eq!(horizon.aged(NOW).len(), 0);
        assert_eq!(horizon.aged(NOW + GRACE / 2).len(), 1);
    }

    #[test]
    fn closing_keeps_what_is_still_open() {
        let mut horizon = Horizon::default();
        horizon.pass(&page(&[(10, 60)]), NOW, GRACE);
        let aged = horizon.aged(NOW);
        horizon.see(Position(4));
        horizon.close(&aged, &[Position(7)], NOW);
        assert_eq!(spans(&horizon), [(7, 7)]);
        horizon.close(&horizon.aged(NOW), &[], NOW);
        assert_eq!(spans(&horizon), []);
    }

    #[test]
    fn a_look_closes_no_hole_between_the_old_ones_and_takes_no_row_for_a_hole() {
        let mut horizon = Horizon::default();
        horizon.pass(&page(&[(2, 60), (4, 60)]), NOW, GRACE);
        horizon.pass(&page(&[(6, 0)]), NOW, GRACE);
        horizon.pass(&page(&[(8, 60)]), NOW, GRACE);
        let looked_at = horizon.aged(NOW);
        assert_eq!(looked_at, [Span::new(Position(1), Position(7))]);
        horizon.close(&looked_at, &[2, 3, 4, 8].map(Position), NOW);
        assert_eq!(spans(&horizon), [(3, 3), (5, 5)]);
    }

    #[test]
    fn the_old_holes_of_a_page_that_others_emptied_go_by_one_look() {
        let mut horizon = Horizon::default();
        let rows: Vec<_> = (1..=2_000).map(|n| (n * 3, 60)).collect();
        horizon.pass(&page(&rows), NOW, GRACE);
        assert_eq!(horizon.hole_count(), 2_000);
        horizon.close(&horizon.aged(NOW), &[], NOW);
        assert_eq!(horizon.hole_count(), 0);
    }

    #[test]
    fn many_holes_are_swept_as_coarser_spans_that_cover_them_all() {
        let mut horizon = Horizon::default();
        let rows: Vec<_> = (1..=3000).map(|n| (n * 2 + n / 100 * 50, 0)).collect();
        horizon.pass(&page(&rows), NOW, GRACE);
        let exact: Vec<Position> = horizon.holes.keys().copied().collect();
        let merged = horizon.spans();
        assert!(merged.len() <= MAX_SPANS, "{}", merged.len());
        assert!(exact.iter().all(|hole| merged.iter().any(|span| span.contains(*hole))));
    }
}
