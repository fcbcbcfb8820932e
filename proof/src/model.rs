//! Model checking: every order of events of a small system that runs the shipped machine.
//!
//! A state holds the machines themselves, the table, the log, and what is under way: a claim whose
//! page was read and whose sweep was not, a message in the log whose answer is not here, a settle
//! that has happened and is not confirmed. An event moves one of them. A worker that stands still is
//! told nothing and asked nothing, while what it has sent goes on, until after its lease is over.

mod state;

use std::time::Duration;

use outbox_core::machine::Time;
use stateright::{Model, Property};

use self::state::{Name, State};

/// Messages below are of the key whose order counts, in the order of their names.
const OTHERS: Name = 10;

/// A small system.
#[derive(Debug, Clone)]
pub struct Setup {
    /// What it is called.
    pub name: &'static str,
    /// Workers.
    pub workers: usize,
    /// What each writer adds, a transaction each, one after the other.
    pub writers: Vec<Vec<Name>>,
    /// Whether the store gives the lane to every worker at once, whatever the leases say.
    pub everybody_owns: bool,
    /// Crashes, lost messages and lost answers.
    pub faults: u8,
    /// A message that the broker rejects until an operator has mended it.
    pub poison: Option<Name>,
    /// How often a worker stands still past its lease, while something of it is under way.
    pub pauses: u8,
    /// Until when writers may tarry and faults happen.
    pub storm: Time,
    /// Until when everything must be delivered; where that is no question, the end.
    pub limit: Time,
    /// Whether everything must be delivered by then.
    pub delivers: bool,
}

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A writer inserts or commits.
    Write(usize),
    /// An operator mends the rejected message and has it tried again.
    Mend,
    /// A claim takes its next snapshot, or is answered.
    Read(usize),
    /// A claim is lost.
    LoseClaim(usize),
    /// The broker decides about a message.
    Decide(usize, usize),
    /// A message is lost on its way.
    LoseSend(usize, usize),
    /// The broker's answer comes.
    Answer(usize, usize),
    /// The broker's answer is lost.
    LoseAnswer(usize, usize),
    /// A settle takes effect, or is confirmed.
    Settle(usize, usize),
    /// A settle's request, or its answer, is lost.
    LoseSettle(usize, usize),
    /// A worker crashes, and another one starts in its place.
    Crash(usize),
    /// A worker stands still for so long. What it has sent goes on without it.
    Stand(usize, Duration),
    /// Time passes until a machine wants something.
    Pass,
}

impl Setup {
    /// The systems that are checked.
    pub fn all() -> Vec<Self> {
        let seconds = Duration::from_secs;
        let base = Self {
            name: "",
            workers: 1,
            writers: vec![vec![1, 2], vec![OTHERS]],
            everybody_owns: false,
            faults: 0,
            poison: None,
            pauses: 0,
            storm: seconds(25),
            limit: seconds(60),
            delivers: true,
        };
        let soon = Self { storm: seconds(4), limit: seconds(120), ..base.clone() };
        let everybody = Self {
            workers: 2,
            everybody_owns: true,
            limit: seconds(4),
            delivers: false,
            ..soon.clone()
        };
        let alone = vec![vec![1, 2]];
        let three = vec![vec![1, 2, 3], vec![OTHERS]];
        vec![
            Self { name: "no fault", ..base.clone() },
            Self { name: "three messages of a key", writers: three, ..base },
            Self { name: "one worker, one fault", faults: 1, ..soon.clone() },
            Self { name: "a rejected message", poison: Some(1), ..soon.clone() },
            Self {
                name: "a rejected message and a fault",
                poison: Some(1),
                faults: 1,
                writers: alone.clone(),
                ..soon.clone()
            },
            Self {
                name: "two workers, one fault",
                workers: 2,
                faults: 1,
                writers: alone.clone(),
                ..soon.clone()
            },
            Self {
                name: "the only worker stands still",
                pauses: 1,
                writers: alone.clone(),
                limit: seconds(300),
                ..soon.clone()
            },
            Self {
                name: "one of two workers stands still",
                workers: 2,
                pauses: 1,
                writers: alone.clone(),
                limit: seconds(300),
                ..soon.clone()
            },
            Self { name: "everybody owns the lane", writers: alone, ..everybody.clone() },
            Self { name: "everybody owns the lane, others write", ..everybody },
        ]
    }

    fn is_written(&self, state: &State) -> bool {
        self.writers.iter().zip(&state.written).all(|(adds, steps)| *steps == adds.len() * 2)
    }
}

impl Model for Setup {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State::new(self)]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        let stormy = state.now <= self.storm;
        let faulty = stormy && state.faults > 0;
        for (writer, adds) in self.writers.iter().enumerate() {
            if state.written[writer] < adds.len() * 2 {
                steps.push(Step::Write(writer));
            }
        }
        let mut quiet = true;
        for (index, worker) in state.workers.iter().enumerate() {
            let Some(worker) = worker else { continue };
            let under_way = steps.len();
            if worker.stands() {
                worker.goes_on_without_it(index, steps);
                continue;
            }
            if worker.claim.is_some() {
                steps.push(Step::Read(index));
                steps.extend(faulty.then_some(Step::LoseClaim(index)));
            }
            for which in 0..worker.sends.len() {
                steps.push(Step::Decide(index, which));
                steps.extend(faulty.then_some(Step::LoseSend(index, which)));
            }
            for which in 0..worker.answers.len() {
                steps.push(Step::Answer(index, which));
                steps.extend(faulty.then_some(Step::LoseAnswer(index, which)));
            }
            for which in 0..worker.settles.len() {
                steps.push(Step::Settle(index, which));
                steps.extend(faulty.then_some(Step::LoseSettle(index, which)));
            }
            let busy = steps.len() > under_way;
            quiet &= !busy;
            if busy && stormy && state.pauses > 0 {
                steps.extend(state::PAUSES.map(|long| Step::Stand(index, long)));
            }
            steps.extend(faulty.then_some(Step::Crash(index)));
        }
        let held = state.rows.values().any(|row| row.state.held);
        if held && quiet {
            steps.push(Step::Mend);
        }
        let stands = state.workers.iter().flatten().any(state::Worker::stands);
        let done = quiet && !stands && self.is_written(state) && state.rows.is_empty();
        let may_pass = quiet && !done && !held;
        let next = state.next_moment();
        if may_pass && next <= self.limit && (next <= self.storm || self.is_written(state)) {
            steps.push(Step::Pass);
        }
    }

    fn next_state(&self, last: &State, step: Step) -> Option<State> {
        let mut state = last.clone();
        match step {
            Step::Write(writer) => state.write(self, writer),
            Step::Mend => state.mend(),
            Step::Read(index) => state.read(index),
            Step::Decide(index, which) => state.decide(index, which),
            Step::Answer(index, which) => state.answer(index, which, false),
            Step::Settle(index, which) => state.settle(index, which),
            Step::Pass => state.pass_time(),
            Step::Stand(index, long) => state.stand(index, long),
            fault => {
                state.faults -= 1;
                match fault {
                    Step::LoseClaim(index) => state.lose_claim(index),
                    Step::LoseSend(index, which) => state.lose_send(index, which),
                    Step::LoseAnswer(index, which) => state.answer(index, which, true),
                    Step::LoseSettle(index, which) => state.lose_settle(index, which),
                    Step::Crash(index) => state.crash(index),
                    _ => return None,
                }
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all = vec![
            Property::<Self>::always("first appearances follow commit order", |_, state| {
                let mut first: Vec<Name> = Vec::new();
                for name in state.log.iter().filter(|name| **name < OTHERS) {
                    if !first.contains(name) {
                        first.push(*name);
                    }
                }
                first.windows(2).all(|pair| pair[0] < pair[1])
                    && first.iter().zip(1..).all(|(name, place)| *name == place)
            }),
            Property::<Self>::always(
                "nothing is lost, ghostly, or sent against a rule",
                |_, state| state.wrong.is_empty(),
            ),
            Property::<Self>::sometimes("everything is delivered", |setup, state| {
                setup.is_written(state) && state.rows.is_empty()
            }),
        ];
        if self.writers.len() > 1 {
            all.push(Property::<Self>::sometimes(
                "a row is committed below another",
                |_, state| state.late_row,
            ));
        }
        let one_at_a_time = self.pauses == 0 || self.workers == 1;
        if self.faults == 0 && one_at_a_time && !self.everybody_owns {
            all.push(Property::<Self>::always("each message appears once", |_, state| {
                let mut log = state.log.clone();
                log.sort_unstable();
                log.windows(2).all(|pair| pair[0] != pair[1])
            }));
        } else if self.poison.is_none() {
            all.push(Property::<Self>::sometimes("a message appears again", |_, state| {
                let mut log = state.log.clone();
                log.sort_unstable();
                log.windows(2).any(|pair| pair[0] == pair[1])
            }));
        }
        if self.delivers {
            all.push(Property::<Self>::eventually(
                "everything is delivered at last",
                |setup, state| {
                    setup.is_written(state)
                        && state.rows.is_empty()
                        && state.committed.iter().all(|name| state.log.contains(name))
                },
            ));
        }
        if self.faults > 0 {
            all.push(Property::<Self>::sometimes("a broker's answer is lost", |_, state| {
                state.lost_answer
            }));
            all.push(Property::<Self>::sometimes("a worker crashes", |_, state| state.crashed));
        }
        if self.pauses > 0 {
            all.push(Property::<Self>::sometimes(
                "a worker goes on while its lane is still in its name",
                |_, state| state.woke_with_its_lane,
            ));
        }
        if self.pauses > 0 && self.workers > 1 {
            all.push(Property::<Self>::sometimes(
                "a worker goes on after its lane was taken",
                |_, state| state.woke_without_its_lane,
            ));
        }
        if self.faults > 0 || (self.pauses > 0 && self.workers > 1) {
            all.push(Property::<Self>::sometimes("a lane is taken over", |_, state| {
                state.took_over
            }));
        }
        if self.poison.is_some() {
            all.push(Property::<Self>::sometimes("a message is held", |_, state| {
                state.rows.values().any(|row| row.state.held)
            }));
        }
        all
    }
}
