//! A program that is started again whenever it is meant to run.

use std::{
    fmt,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use integration_tests::process::{Process, Signal};

/// How long a program that was asked to end may take.
const PATIENCE: Duration = Duration::from_secs(60);

type Start = dyn Fn(usize) -> Result<Process> + Send + Sync;

/// One writer or relay, over all its starts.
pub(crate) struct Program {
    name: String,
    start: Box<Start>,
    state: Mutex<State>,
    /// How often it ended though nobody ended it, or badly though it was asked to.
    fell: AtomicUsize,
}

#[derive(Debug, Default)]
struct State {
    /// `None` while it is meant to be down.
    running: Option<Process>,
    past: Vec<Process>,
}

impl Program {
    /// `start` is told how often the program was started before.
    pub(crate) fn new(
        name: impl Into<String>,
        start: impl Fn(usize) -> Result<Process> + Send + Sync + 'static,
    ) -> Self {
        let (state, fell) = (Mutex::default(), AtomicUsize::new(0));
        Self { name: name.into(), start: Box::new(start), state, fell }
    }

    pub(crate) fn start(&self) -> Result<()> {
        let mut state = self.state();
        let process = (self.start)(state.past.len()).with_context(|| self.name.clone())?;
        state.running = Some(process);
        Ok(())
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        self.state().running.as_ref().context("it is down")?.signal(signal)
    }

    /// Ends it by SIGKILL.
    pub(crate) async fn kill(&self) -> Result<()> {
        let Some(process) = self.state().running.take() else { return Ok(()) };
        // It may have fallen a moment ago.
        let _ = process.signal(Signal::SIGKILL);
        process.end(PATIENCE).await?;
        self.state().past.push(process);
        Ok(())
    }

    /// Asks it to end, and waits until it has.
    pub(crate) async fn terminate(&self) -> Result<()> {
        let Some(process) = self.state().running.take() else { return Ok(()) };
        let _ = process.signal(Signal::SIGTERM);
        let status = process.end(PATIENCE).await;
        if !status.as_ref().is_ok_and(|status| status.success()) {
            self.fell.fetch_add(1, Ordering::Relaxed);
            eprintln!("chaos: {} was asked to end: {status:?}", self.name);
            let _ = process.signal(Signal::SIGKILL);
            process.end(PATIENCE).await?;
        }
        self.state().past.push(process);
        Ok(())
    }

    /// Starts it again if it ended by itself.
    pub(crate) async fn watch(&self) -> Result<()> {
        let has_ended = match &self.state().running {
            Some(process) => process.has_ended()?,
            None => false,
        };
        if has_ended {
            self.fell.fetch_add(1, Ordering::Relaxed);
            eprintln!("chaos: {} ended by itself", self.name);
            self.kill().await?;
            self.start()?;
        }
        Ok(())
    }

    pub(crate) fn fell(&self) -> usize {
        self.fell.load(Ordering::Relaxed)
    }

    /// What it printed, by start.
    pub(crate) fn lines(&self) -> Vec<Vec<String>> {
        let state = self.state();
        state.past.iter().chain(&state.running).map(Process::lines).collect()
    }

    /// How many lines it printed that begin so.
    pub(crate) fn count(&self, beginning: &str) -> usize {
        self.lines().concat().iter().filter(|line| line.starts_with(beginning)).count()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program").field("name", &self.name).finish_non_exhaustive()
    }
}
