//! A program of the workspace, run to be killed.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{sys::signal::kill, unistd::Pid};

pub use nix::sys::signal::Signal;

use crate::watchdog;

/// A running program. It is killed when the value is dropped, and by a watchdog when this process
/// ends.
///
/// ```no_run
/// # async fn a_test() -> anyhow::Result<()> {
/// use std::time::Duration;
/// use integration_tests::process::{Process, Signal};
///
/// let worker = Process::spawn(env!("CARGO"), ["--version"], [("DATABASE_URL", "mysql://..")])?;
/// worker.line_with("cargo", Duration::from_secs(10)).await?;
/// worker.signal(Signal::SIGKILL)?;
/// worker.end(Duration::from_secs(10)).await?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Process {
    child: Mutex<Child>,
    lines: Arc<Mutex<Vec<String>>>,
    name: String,
}

const POLL: Duration = Duration::from_millis(10);

impl Process {
    /// Runs the program with these arguments and, besides those inherited, these variables.
    ///
    /// Its standard output is collected line by line; its standard error is this process's.
    ///
    /// # Errors
    ///
    /// When it cannot be run.
    pub fn spawn(
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
        variables: impl IntoIterator<Item = (impl AsRef<OsStr>, impl AsRef<OsStr>)>,
    ) -> Result<Self> {
        let program = program.as_ref();
        let name = program.to_string_lossy().into_owned();
        let mut child = Command::new(program)
            .args(arguments)
            .envs(variables)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .with_context(|| format!("could not run {name}"))?;
        watchdog::guard_process(child.id())?;
        let output = child.stdout.take().context("the pipe from the program")?;
        let lines = Arc::new(Mutex::new(vec![]));
        let collected = Arc::clone(&lines);
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                collected.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Ok(Self { child: Mutex::new(child), lines, name })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child().id()
    }

    /// Sends it a signal: SIGKILL for a crash, SIGSTOP and SIGCONT for a pause, SIGTERM to ask.
    ///
    /// # Errors
    ///
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let mut child = self.child();
        // Not reaped yet, so that the pid is still this child's.
        ensure!(child.try_wait()?.is_none(), "{} has ended", self.name);
        Ok(kill(Pid::from_raw(child.id().try_into()?), signal)?)
    }

    /// Whether it has ended.
    ///
    /// # Errors
    ///
    /// When the system does not tell.
    pub fn has_ended(&self) -> Result<bool> {
        Ok(self.child().try_wait()?.is_some())
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// When it still runs after `patience`.
    pub async fn end(&self, patience: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child().try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} still runs after {patience:?}", self.name);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// How many bytes of its memory are resident.
    ///
    /// # Errors
    ///
    /// When it has ended, or the system does not tell.
    pub fn resident(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes = line.context("no VmRSS")?.trim().trim_end_matches(" kB");
        Ok(kilobytes.parse::<u64>()? * 1024)
    }

    /// What it has printed so far.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until it prints a line that contains `text`, or has done so, and gives the line.
    ///
    /// # Errors
    ///
    /// When it ends before, or does not within `patience`.
    pub async fn line_with(&self, text: &str, patience: Duration) -> Result<String> {
        let deadline = Instant::now() + patience;
        loop {
            let ended = self.child().try_wait()?;
            if let Some(line) = self.lines().into_iter().find(|line| line.contains(text)) {
                return Ok(line);
            }
            if let Some(status) = ended {
                // What it wrote last may still be in the pipe.
                tokio::time::sleep(POLL * 10).await;
                return self.lines().into_iter().find(|line| line.contains(text)).with_context(
                    || format!("{} ended ({status}) without a line with {text:?}", self.name),
                );
            }
            if Instant::now() > deadline {
                bail!("{} printed no line with {text:?} in {patience:?}", self.name);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn child(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Whether the program was ended by that signal.
#[must_use]
pub fn was_ended_by(status: ExitStatus, signal: Signal) -> bool {
    status.signal() == Some(signal as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn shell(script: &str) -> Process {
        Process::spawn("sh", ["-c", script], [("GREETING", "hello")]).unwrap()
    }

    #[tokio::test]
    async fn lines_are_collected_and_waited_for() {
        let process = shell("echo $GREETING; echo done");
        assert_eq!(process.line_with("done", SOON).await.unwrap(), "done");
        assert_eq!(process.lines(), ["hello", "done"]);
        assert!(process.end(SOON).await.unwrap().success());
        process.line_with("never", SOON).await.unwrap_err();
    }

    #[tokio::test]
    async fn a_paused_process_prints_nothing_until_it_goes_on() {
        let process = shell("read line < /dev/null; while :; do echo tick; sleep 0.01; done");
        process.line_with("tick", SOON).await.unwrap();
        process.signal(Signal::SIGSTOP).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let paused = process.lines().len();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(process.lines().len(), paused);
        process.signal(Signal::SIGCONT).unwrap();
        let deadline = Instant::now() + SOON;
        while process.lines().len() == paused {
            assert!(Instant::now() < deadline);
            tokio::time::sleep(POLL).await;
        }
    }

    #[tokio::test]
    async fn a_killed_process_has_ended_by_the_signal() {
        let process = shell("echo up; sleep 60");
        process.line_with("up", SOON).await.unwrap();
        process.signal(Signal::SIGKILL).unwrap();
        assert!(was_ended_by(process.end(SOON).await.unwrap(), Signal::SIGKILL));
        process.signal(Signal::SIGKILL).unwrap_err();
    }
}
