//! One server process that tests start, stop and hurt.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{account::Account, folder::RunFolder, tool};
use crate::watchdog;

/// A server of this process's own, on one port and one data folder for all its starts.
///
/// It is killed when the value is dropped, and by a watchdog when this process ends.
#[derive(Debug, Clone)]
pub struct Server(Arc<Shared>);

/// How a server is started, the first time and every time after.
#[derive(Debug)]
pub(super) struct Recipe {
    pub(super) name: String,
    pub(super) port: u16,
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
    /// What its log says once it answers.
    pub(super) ready: &'static str,
    pub(super) folder: RunFolder,
}

#[derive(Debug)]
struct Shared {
    recipe: Recipe,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    child: Child,
    /// Where in the log this start begins: what an earlier one wrote does not count.
    log_from: usize,
}

/// Longest time for a start: recovery after a kill, on a loaded machine.
const START: Duration = Duration::from_secs(120);
/// Longest time for an orderly stop before it fails.
const STOP: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

impl Server {
    pub(super) fn new(recipe: Recipe) -> Self {
        Self(Arc::new(Shared { recipe, running: Mutex::new(None) }))
    }

    /// The port on 127.0.0.1, the same for all starts.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.0.recipe.port
    }

    /// Its process, while one runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.0.running().as_ref().map(|running| running.child.id())
    }

    /// Starts it again, on its port and its data, and waits until it answers.
    ///
    /// # Errors
    ///
    /// When it runs already, or ends or stays silent instead of starting; with the end of its log.
    pub async fn start(&self) -> Result<()> {
        self.launch()?;
        self.ready().await
    }

    /// Starts it without waiting: a Kafka node may need others before it is [`ready`].
    ///
    /// [`ready`]: Self::ready
    ///
    /// # Errors
    ///
    /// When it runs already or cannot be run.
    pub fn launch(&self) -> Result<()> {
        self.0.launch()
    }

    /// Waits until the server that was launched answers.
    ///
    /// # Errors
    ///
    /// When it ends or stays silent instead; with the end of its log.
    pub async fn ready(&self) -> Result<()> {
        let shared = Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || shared.await_ready()).await?
    }

    /// Stops it in order (SIGTERM) and waits for its end.
    ///
    /// # Errors
    ///
    /// When it does not run, or does not end in time.
    pub async fn stop(&self) -> Result<()> {
        let shared = Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || shared.stop()).await?
    }

    /// Kills it (SIGKILL) and waits for its end: what a crash of the process leaves behind.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub fn kill(&self) -> Result<()> {
        let mut running = self.0.running().take().context(NOT_RUNNING)?;
        running.child.kill()?;
        running.child.wait()?;
        Ok(())
    }

    /// Stops its clock (SIGSTOP): connections stay open, nothing is answered any more.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub fn pause(&self) -> Result<()> {
        self.0.signal(Signal::SIGSTOP)?;
        self.0.await_standstill()
    }

    /// Lets it go on after [`pause`](Self::pause).
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub fn resume(&self) -> Result<()> {
        self.0.signal(Signal::SIGCONT)
    }

    /// All that the server wrote since it was made.
    #[must_use]
    pub fn log(&self) -> String {
        self.0.log()
    }
}

const NOT_RUNNING: &str = "the server does not run";

impl Shared {
    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn launch(&self) -> Result<()> {
        let mut running = self.running();
        ensure!(running.is_none(), "{} runs already", self.recipe.name);
        let log = OpenOptions::new().create(true).append(true).open(self.log_path())?;
        let log_from = self.log().len();
        let mut command = Command::new(&self.recipe.program);
        command
            .args(&self.recipe.arguments)
            .current_dir(self.recipe.folder.path())
            // An interrupt from the terminal is for the tests; the watchdog ends the servers.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(File::try_clone(&log)?)
            .stderr(log);
        let child = Account::unprivileged()
            .run(&mut command)
            .spawn()
            .with_context(|| format!("could not run {}", self.recipe.program.display()))?;
        let pid = child.id();
        *running = Some(Running { child, log_from });
        watchdog::guard_process(pid)
    }

    fn await_ready(&self) -> Result<()> {
        let deadline = Instant::now() + START;
        loop {
            let mut running = self.running();
            let start = running.as_mut().context(NOT_RUNNING)?;
            let log = self.log();
            if log.get(start.log_from..).is_some_and(|log| log.contains(self.recipe.ready)) {
                return Ok(());
            }
            if let Some(status) = start.child.try_wait()? {
                *running = None;
                bail!("{} ended ({status}):\n{}", self.recipe.name, tool::tail(&log));
            }
            drop(running);
            if Instant::now() > deadline {
                bail!("{} did not answer in {START:?}:\n{}", self.recipe.name, tool::tail(&log));
            }
            thread::sleep(POLL);
        }
    }

    fn stop(&self) -> Result<()> {
        // A paused process takes SIGTERM only once it goes on.
        self.signal(Signal::SIGTERM)?;
        self.signal(Signal::SIGCONT)?;
        let deadline = Instant::now() + STOP;
        while Instant::now() < deadline {
            let mut running = self.running();
            if running.as_mut().context(NOT_RUNNING)?.child.try_wait()?.is_some() {
                *running = None;
                return Ok(());
            }
            drop(running);
            thread::sleep(POLL);
        }
        bail!("{} did not stop in {STOP:?}:\n{}", self.recipe.name, tool::tail(&self.log()))
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let mut running = self.running();
        let child = &mut running.as_mut().context(NOT_RUNNING)?.child;
        // Not reaped yet, so that the pid is still this child's.
        ensure!(child.try_wait()?.is_none(), NOT_RUNNING);
        Ok(kill(Pid::from_raw(child.id().try_into()?), signal)?)
    }

    /// Waits until each thread has stopped: the signal is on its way when `kill` returns, and a
    /// query is answered meanwhile.
    fn await_standstill(&self) -> Result<()> {
        let pid = self.running().as_ref().context(NOT_RUNNING)?.child.id();
        let deadline = Instant::now() + STOP;
        while !stands_still(pid)? {
            ensure!(Instant::now() < deadline, "{} did not stand still", self.recipe.name);
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn log_path(&self) -> PathBuf {
        self.recipe.folder.path().join("log")
    }

    fn log(&self) -> String {
        fs::read(self.log_path())
            .map(|log| String::from_utf8_lossy(&log).into_owned())
            .unwrap_or_default()
    }
}

/// Whether each thread of the process is stopped by a signal.
fn stands_still(pid: u32) -> Result<bool> {
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread that ended since it was listed runs no more.
        let Ok(status) = fs::read_to_string(thread?.path().join("status")) else { continue };
        if !status.lines().any(|line| line.starts_with("State:\tT")) {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(mut running) = self.running().take() {
            let _ = running.child.kill();
            let _ = running.child.wait();
        }
    }
}
