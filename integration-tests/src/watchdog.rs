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

/// Removes the container of this name when the present process is gone, if there is one then.
pub(crate) fn guard_container(name: &str) -> Result<()> {
    tell("container", name)
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

#[cfg(test)]
mod tests {
    use std::{env, fs, io::Write, os::unix::fs::PermissionsExt, process::Stdio};

    use super::{Command, SCRIPT};

    /// What the watchdog has docker do about a container that comes to be before the call with
    /// that number.
    fn calls_for_a_container_created_before_call(number: usize) -> String {
        let folder = tempfile::tempdir().unwrap();
        let (docker, calls) = (folder.path().join("docker"), folder.path().join("calls"));
        let script = format!(
            "#!/bin/sh\necho \"$@\" >> {calls}\n[ $(wc -l < {calls}) -lt {number} ] || echo it\n",
            calls = calls.display()
        );
        fs::write(&docker, script).unwrap();
        fs::set_permissions(&docker, fs::Permissions::from_mode(0o755)).unwrap();
        let path = format!("{}:{}", folder.path().display(), env::var("PATH").unwrap());
        let mut watchdog = Command::new("sh")
            .args(["-c", SCRIPT])
            .env("PATH", path)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        watchdog.stdin.take().unwrap().write_all(b"container it\n").unwrap();
        assert!(watchdog.wait().unwrap().success());
        fs::read_to_string(calls).unwrap()
    }

    #[test]
    fn a_container_is_removed_also_if_it_was_still_being_created() {
        let removal = "rm -f -v it\n";
        assert_eq!(calls_for_a_container_created_before_call(1), removal);
        assert_eq!(calls_for_a_container_created_before_call(2), removal.repeat(2));
    }
}
