//! What can befall the parts of a run.

use std::{fmt, time::Duration};

/// How many of each take part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cast {
    pub(crate) writers: usize,
    pub(crate) relays: usize,
    pub(crate) brokers: usize,
}

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Part {
    Writer(usize),
    Relay(usize),
    Database,
    Broker(usize),
}

/// A way that leads through a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Link {
    /// From the writers to the database.
    Writers,
    /// From one relay to the database.
    Relay(usize),
    /// From the relays to one broker.
    Broker(usize),
}

/// Whose connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Client {
    Writers,
    Relays,
}

/// A kind of trouble, and whom it strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// SIGKILL; started again after the fault's time.
    Kill(Part),
    /// SIGTERM; started again after the fault's time.
    Terminate(Part),
    /// SIGSTOP, and SIGCONT after the fault's time.
    Stop(Part),
    /// SIGKILL, started again at once, and silent to its clients for the fault's time.
    SlowStart(Part),
    /// All connections are reset.
    Cut(Link),
    /// Every piece is held back, both ways.
    Delay(Link),
    /// Every piece is swallowed, both ways; connections stay open.
    BlackHole(Link),
    /// No connection can be made; those that exist are reset.
    Refuse(Link),
    /// A writer's COMMIT is acted on, and its reply lost.
    CommitReplyLost,
    /// A writer's COMMIT does not arrive.
    CommitLost,
    /// A relay's settlement is acted on, and its reply lost.
    SettleReplyLost(usize),
    /// The server ends connections (`KILL`).
    ConnectionsKilled(Client),
    /// The database refuses writes.
    ReadOnly,
    /// The topic beside the ordered one is deleted, and created again after the fault's time.
    TopicDeleted,
}

/// One trouble, and how long it lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    pub(crate) lasts: Duration,
}

/// What only one fault at a time may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Hold {
    Process(Part),
    /// The processes of all brokers: with two of three down nothing can be delivered, and a third
    /// of the run would be waiting for elections.
    Brokers,
    Link(Link),
    Topic,
}

impl Kind {
    /// What it has while it lasts, sorted, so that two faults never wait for each other.
    pub(crate) fn holds(self, cast: Cast) -> Vec<Hold> {
        let mut holds = match self {
            Self::Kill(part) | Self::Terminate(part) | Self::Stop(part) => vec![process(part)],
            Self::SlowStart(part) => {
                let links = links_to(part, cast).into_iter().map(Hold::Link);
                [process(part)].into_iter().chain(links).collect()
            }
            Self::Cut(link) | Self::Delay(link) | Self::BlackHole(link) | Self::Refuse(link) => {
                vec![Hold::Link(link)]
            }
            Self::CommitReplyLost | Self::CommitLost => vec![Hold::Link(Link::Writers)],
            Self::SettleReplyLost(relay) => vec![Hold::Link(Link::Relay(relay))],
            Self::ConnectionsKilled(_) | Self::ReadOnly => vec![Hold::Process(Part::Database)],
            Self::TopicDeleted => vec![Hold::Topic],
        };
        holds.sort();
        holds
    }

    /// How many relays have messages on a way that it touches: each may repeat what it had in
    /// flight.
    pub(crate) fn relays_struck(self, cast: Cast) -> usize {
        match self {
            Self::Kill(part) | Self::Terminate(part) | Self::Stop(part) | Self::SlowStart(part) => {
                match part {
                    Part::Writer(_) => 0,
                    Part::Relay(_) => 1,
                    Part::Database | Part::Broker(_) => cast.relays,
                }
            }
            Self::Cut(link) | Self::Delay(link) | Self::BlackHole(link) | Self::Refuse(link) => {
                match link {
                    Link::Writers => 0,
                    Link::Relay(_) => 1,
                    Link::Broker(_) => cast.relays,
                }
            }
            Self::CommitReplyLost | Self::CommitLost => 0,
            Self::SettleReplyLost(_) => 1,
            Self::ConnectionsKilled(Client::Writers) | Self::TopicDeleted => 0,
            Self::ConnectionsKilled(Client::Relays) | Self::ReadOnly => cast.relays,
        }
    }

    /// The same for whichever of several equal parts it strikes: a row of a table.
    pub(crate) fn class(self) -> String {
        let named = self.to_string();
        named.trim_end_matches(|it: char| it.is_ascii_digit()).trim_end().to_owned()
    }
}

fn process(part: Part) -> Hold {
    match part {
        Part::Broker(_) => Hold::Brokers,
        part => Hold::Process(part),
    }
}

/// The ways to a server. Nobody connects to the others.
pub(crate) fn links_to(part: Part, cast: Cast) -> Vec<Link> {
    match part {
        Part::Database => {
            [Link::Writers].into_iter().chain((0..cast.relays).map(Link::Relay)).collect()
        }
        Part::Broker(node) => vec![Link::Broker(node)],
        Part::Writer(_) | Part::Relay(_) => vec![],
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Writer(number) => write!(f, "writer {number}"),
            Self::Relay(number) => write!(f, "relay {number}"),
            Self::Database => f.write_str("database"),
            Self::Broker(number) => write!(f, "broker {number}"),
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Writers => f.write_str("database and writers"),
            Self::Relay(number) => write!(f, "database and relay {number}"),
            Self::Broker(number) => write!(f, "relays and broker {number}"),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(part) => write!(f, "SIGKILL: {part}"),
            Self::Terminate(part) => write!(f, "SIGTERM: {part}"),
            Self::Stop(part) => write!(f, "SIGSTOP, SIGCONT: {part}"),
            Self::SlowStart(part) => write!(f, "SIGKILL and slow start: {part}"),
            Self::Cut(link) => write!(f, "connections cut: {link}"),
            Self::Delay(link) => write!(f, "delay: {link}"),
            Self::BlackHole(link) => write!(f, "black hole: {link}"),
            Self::Refuse(link) => write!(f, "connections refused: {link}"),
            Self::CommitReplyLost => f.write_str("reply of a COMMIT lost: writers"),
            Self::CommitLost => f.write_str("COMMIT lost: writers"),
            Self::SettleReplyLost(relay) => write!(f, "reply of a settlement lost: relay {relay}"),
            Self::ConnectionsKilled(Client::Writers) => f.write_str("KILL of connections: writers"),
            Self::ConnectionsKilled(Client::Relays) => f.write_str("KILL of connections: relays"),
            Self::ReadOnly => f.write_str("read-only: database"),
            Self::TopicDeleted => f.write_str("deleted, created: topic beside"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {:.1} s", self.kind, self.lasts.as_secs_f64())
    }
}
