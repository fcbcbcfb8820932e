//! What the proxy was told to do, and what that means for a piece of bytes. Pure.

use std::{net::SocketAddr, ops::RangeInclusive, time::Duration};

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::Direction;

#[derive(Debug)]
pub(super) struct Faults {
    pub(super) server: SocketAddr,
    pub(super) happened: usize,
    rng: StdRng,
    to_server: Way,
    to_client: Way,
    /// A text to wait for, and whether to cut before it or after it was acted on, once, or to
    /// swallow it, each time.
    awaited: Option<(Vec<u8>, Verdict)>,
}

/// The faults of one direction.
#[derive(Debug, Default)]
struct Way {
    delay: Option<RangeInclusive<Duration>>,
    swallow: bool,
    cut_after: Option<usize>,
}

/// What becomes of a piece of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Forward,
    Swallow,
    /// Forward this many, then cut.
    Cut(usize),
    /// Forward, and drop all that the server answers; cut when it has.
    DropReply,
}

/// The end of what was forwarded before: a text may be spread over two pieces.
pub(super) type Tail = Vec<u8>;

impl Faults {
    pub(super) fn none(server: SocketAddr, seed: u64) -> Self {
        Self {
            server,
            happened: 0,
            rng: StdRng::seed_from_u64(seed),
            to_server: Way::default(),
            to_client: Way::default(),
            awaited: None,
        }
    }

    pub(super) fn delay(&mut self, direction: Direction, time: RangeInclusive<Duration>) {
        self.way(direction).delay = Some(time);
    }

    pub(super) fn swallow(&mut self, direction: Direction) {
        self.way(direction).swallow = true;
    }

    pub(super) fn cut_after(&mut self, direction: Direction, bytes: usize) {
        self.way(direction).cut_after = Some(bytes);
    }

    pub(super) fn cut_before(&mut self, text: &[u8]) {
        self.awaited = Some((text.to_vec(), Verdict::Cut(0)));
    }

    pub(super) fn cut_reply_of(&mut self, text: &[u8]) {
        self.awaited = Some((text.to_vec(), Verdict::DropReply));
    }

    pub(super) fn silence(&mut self, text: &[u8]) {
        self.awaited = Some((text.to_vec(), Verdict::Swallow));
    }

    pub(super) fn heal(&mut self) {
        self.to_server = Way::default();
        self.to_client = Way::default();
        self.awaited = None;
    }

    /// How long to hold a piece of that direction back.
    pub(super) fn draw_delay(&mut self, direction: Direction) -> Option<Duration> {
        let range = self.way(direction).delay.clone()?;
        Some(self.rng.random_range(range))
    }

    /// Judges a piece, and spends the faults that happen once.
    pub(super) fn judge(&mut self, direction: Direction, piece: &[u8], tail: &mut Tail) -> Verdict {
        if self.way(direction).swallow {
            return Verdict::Swallow;
        }
        if let Some(left) = self.way(direction).cut_after {
            if left <= piece.len() {
                self.way(direction).cut_after = None;
                self.happened += 1;
                return Verdict::Cut(left);
            }
            self.way(direction).cut_after = Some(left - piece.len());
        }
        if direction == Direction::ToServer && self.is_awaited(piece, tail) {
            if let Some((_, Verdict::Swallow)) = self.awaited {
                return Verdict::Swallow;
            }
            self.happened += 1;
            return self.awaited.take().map_or(Verdict::Forward, |(_, verdict)| verdict);
        }
        Verdict::Forward
    }

    fn is_awaited(&self, piece: &[u8], tail: &mut Tail) -> bool {
        let Some((text, _)) = &self.awaited else {
            tail.clear();
            return false;
        };
        tail.extend_from_slice(piece);
        let found = tail.windows(text.len()).any(|window| window == text);
        tail.drain(..tail.len().saturating_sub(text.len().saturating_sub(1)));
        found
    }

    fn way(&mut self, direction: Direction) -> &mut Way {
        match direction {
            Direction::ToServer => &mut self.to_server,
            Direction::ToClient => &mut self.to_client,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Direction::*, *};

    fn faults(seed: u64) -> Faults {
        Faults::none(SocketAddr::from(([127, 0, 0, 1], 1)), seed)
    }

    #[test]
    fn a_text_is_found_across_pieces_and_only_once() {
        let mut faults = faults(0);
        let mut tail = vec![];
        faults.cut_reply_of(b"COMMIT");
        assert_eq!(faults.judge(ToClient, b"COMMIT", &mut vec![]), Verdict::Forward);
        assert_eq!(faults.judge(ToServer, b"xxCOM", &mut tail), Verdict::Forward);
        assert_eq!(faults.judge(ToServer, b"MIT", &mut tail), Verdict::DropReply);
        assert_eq!(faults.judge(ToServer, b"COMMIT", &mut tail), Verdict::Forward);
        assert_eq!(faults.happened, 1);
    }

    #[test]
    fn bytes_are_counted_over_pieces() {
        let mut faults = faults(0);
        faults.cut_after(ToClient, 10);
        assert_eq!(faults.judge(ToClient, &[0; 6], &mut vec![]), Verdict::Forward);
        assert_eq!(faults.judge(ToServer, &[0; 6], &mut vec![]), Verdict::Forward);
        assert_eq!(faults.judge(ToClient, &[0; 6], &mut vec![]), Verdict::Cut(4));
        assert_eq!(faults.judge(ToClient, &[0; 6], &mut vec![]), Verdict::Forward);
    }

    #[test]
    fn the_seed_decides_the_delays() {
        let draw = |seed| {
            let mut faults = faults(seed);
            faults.delay(ToServer, Duration::ZERO..=Duration::from_secs(1));
            [(); 8].map(|()| faults.draw_delay(ToServer))
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert_eq!(faults(1).draw_delay(ToServer), None);
    }
}
