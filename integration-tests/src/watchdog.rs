//! What this process started ends with it: also after a panic, an abort or `kill -9`.
//!
//! Statics are never dropped and a killed process drops nothing at all, so cleaning up cannot be
//! left to `Drop`. A small shell holds the reading end of a pipe to this process. When the pipe
//! closes, it kills every process named on it (by pid and start time, never by name), removes the
//! folders and containers, and prints what the run must not end without saying.

use std::{
    io::Write,
    os::unix::process::CommandExt,
    path::Path,
    process::{ChildStdin, Command, Stdio},
    sync::{Mutex, OnceLock, PoisonError},
};

use anyhow::{Context, Result, ensure};

const SCRIPT: &str = include_str!("watchdog.sh");

/// Kills the process with this pid when the present process is gone.
///
/// # Errors
///
/// When the watchdog cannot be started or has died.
pub(crate) fn guard_process(pid: u32) -> Result<()> {
    tell("process", &pid.to_string())
}

/// Removes the folder when the present process is gone, after its processes were killed.
pub(crate) fn guard_folder(folder: &Path) -> Result<()> {
    tell("folder", folder.to_str().context("a run folder's path must be UTF-8")?)
}

/// Removes the container when the present process is gone.
pub(crate) fn guard_container(id: &str) -> Result<()> {
    tell("container", id)
}

/// Prints the line when the present process is gone: the last thing that its run says.
pub(crate) fn note_at_end(text: &str) -> Result<()> {
    tell("note", text)
}

fn tell(what: &str, value: &str) -> Result<()> {
    ensure!(!value.contains('\n'), "one line names one thing, not {value:?}");
    let mut pipe = pipe()?.lock().unwrap_or_else(PoisonError::into_inner);
    // One write, so that a kill in between leaves no half line.
    pipe.write_all(format!("{what} {value}\n").as_bytes()).context("the watchdog has died")
}

fn pipe() -> Result<&'static Mutex<ChildStdin>> {
    static PIPE: OnceLock<Result<Mutex<ChildStdin>, String>> = OnceLock::new();
    PIPE.get_or_init(|| start().map(Mutex::new).map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow::anyhow!("no watchdog: {error}"))
}

fn start() -> Result<ChildStdin> {
    let mut watchdog = Command::new("sh")
        .args(["-c", SCRIPT, "outbox-watchdog"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .context("sh")?;
    watchdog.stdin.take().context("the pipe to the watchdog")
}
