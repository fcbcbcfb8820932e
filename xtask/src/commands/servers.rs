//! `cargo xtask servers up | down`: the tests' servers, kept between runs of the tests.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{self, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use super::Command;
use crate::cargo::{cargo, run, target};

pub(super) const COMMAND: Command = Command {
    name: "servers",
    usage: "servers up|down",
    about: "start servers for many test runs, and print their variables; stop them",
    run: servers,
};

/// Where a started holder of servers is remembered.
struct State {
    folder: PathBuf,
}

const POLL: Duration = Duration::from_millis(100);

fn servers(arguments: &[String]) -> Result<()> {
    let state = State { folder: target().join("servers") };
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["up"] => up(&state),
        ["down"] => down(&state),
        _ => bail!("up or down?"),
    }
}

fn up(state: &State) -> Result<()> {
    if state.holder().is_none() {
        start(state)?;
    }
    // Another call may have started it just now.
    while !is_ready(state)? {
        ensure!(state.holder().is_some(), "the servers did not start");
        thread::sleep(POLL);
    }
    print!("{}", fs::read_to_string(state.variables())?);
    Ok(())
}

fn is_ready(state: &State) -> Result<bool> {
    Ok(fs::read_to_string(state.variables())?.contains("# ready"))
}

/// Starts the holder and waits until it has all servers, showing what it says meanwhile.
fn start(state: &State) -> Result<()> {
    run(cargo(&["build", "--quiet", "--package", "integration-tests", "--bin"]).arg(HOLDER))?;
    fs::create_dir_all(&state.folder)?;
    let log = state.folder.join("log");
    let mut holder = process::Command::new(target().join("debug").join(HOLDER))
        .stdin(Stdio::null())
        .stdout(File::create(state.variables())?)
        .stderr(File::create(&log)?)
        // Not ended by the interrupt that is meant for this command's caller.
        .process_group(0)
        .spawn()
        .context("could not start the holder of the servers")?;
    let pid = holder.id();
    let began = began(pid).context("the holder of the servers ended at once")?;
    fs::write(state.pid(), format!("{pid} {began}"))?;
    let mut log = File::open(log)?;
    loop {
        let ended = holder.try_wait()?;
        show(&mut log)?;
        if is_ready(state)? {
            return Ok(());
        }
        if let Some(status) = ended {
            fs::remove_file(state.pid())?;
            bail!("the servers did not start ({status})");
        }
        thread::sleep(POLL);
    }
}

const HOLDER: &str = "servers";

fn show(log: &mut File) -> Result<()> {
    let mut said = vec![];
    log.read_to_end(&mut said)?;
    Ok(std::io::stderr().write_all(&said)?)
}

/// Ends the holder; what guards the servers ends them when it is gone.
fn down(state: &State) -> Result<()> {
    let Some(pid) = state.holder() else {
        eprintln!("no servers are up");
        return Ok(());
    };
    run(process::Command::new("kill").arg(pid.to_string()))?;
    for _ in 0..100 {
        if state.holder().is_none() {
            fs::remove_file(state.pid())?;
            return Ok(());
        }
        thread::sleep(POLL);
    }
    bail!("the holder of the servers, {pid}, did not end")
}

impl State {
    fn pid(&self) -> PathBuf {
        self.folder.join("pid")
    }

    fn variables(&self) -> PathBuf {
        self.folder.join("variables")
    }

    /// The running holder. A pid alone could be another process's by now.
    fn holder(&self) -> Option<u32> {
        let remembered = fs::read_to_string(self.pid()).ok()?;
        let (pid, since) = remembered.split_once(' ')?;
        let pid = pid.parse().ok()?;
        (began(pid)? == since).then_some(pid)
    }
}

/// When a process began, in clock ticks; none when it is gone, or dead but not reaped.
fn began(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold spaces.
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    (fields.first() != Some(&"Z")).then(|| fields.get(19).map(|&field| field.to_owned()))?
}
