//! The examples as a user runs them: programs that are told by variables where the servers are.

mod http;
mod operator;
mod orders;
mod orm;
mod quickstart;
mod relay;

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use integration_tests::process::{Process, Signal};
use outbox_mysql::sqlx::{self, AssertSqlSafe, Connection, MySqlConnection};
use tokio::sync::OnceCell;

/// How long to wait for what must come, on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(120);

/// The variables that no example may have from whoever runs the tests.
const OURS: [&str; 2] = ["DATABASE_URL", "KAFKA_BOOTSTRAP"];

/// The example's program. All are built when the first is asked for.
async fn program(name: &str) -> Result<PathBuf> {
    static BUILT: OnceCell<Result<HashMap<String, PathBuf>, String>> = OnceCell::const_new();
    let once = || async {
        let built = tokio::task::spawn_blocking(build).await.map_err(anyhow::Error::from);
        built.flatten().map_err(|error| format!("{error:#}"))
    };
    let programs = BUILT.get_or_init(once).await.as_ref().map_err(|why| anyhow!("{why}"))?;
    programs.get(name).cloned().with_context(|| format!("there is no example {name}"))
}

/// Builds the examples of the whole workspace, because `cargo test --workspace` has just done so:
/// with the same features nothing is built twice.
fn build() -> Result<HashMap<String, PathBuf>> {
    let mut cargo = Command::new(env!("CARGO"));
    // What cargo tells a test of its package: build scripts that look at it (ring's does) would
    // see a change, and half of the workspace would be built again, now and at the next test.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            cargo.env_remove(&name);
        }
    }
    let output = cargo
        .args(["build", "--workspace", "--examples", "--quiet"])
        .arg("--message-format=json-render-diagnostics")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "the examples do not build");
    let mut programs = HashMap::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        let target = &message["target"];
        if let (true, Some(name), Some(path)) = (
            target["kind"][0] == "example",
            target["name"].as_str(),
            message["executable"].as_str(),
        ) {
            programs.insert(name.to_owned(), path.into());
        }
    }
    Ok(programs)
}

/// Runs an example in this folder, as from a terminal there.
async fn run(name: &str, folder: &Path, variables: &[(&str, &str)]) -> Result<Process> {
    let mut arguments = vec![OsString::from("--chdir"), folder.into()];
    for variable in OURS {
        arguments.extend(["--unset".into(), variable.into()]);
    }
    // After what is unset: `env` takes assignments in front of the program.
    arguments.extend(variables.iter().map(|(name, value)| format!("{name}={value}").into()));
    arguments.push(program(name).await?.into());
    Process::spawn("env", arguments, [("RUST_LOG", "error")])
}

/// How a program ended that ends by itself, and what it said.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    output: String,
    errors: String,
}

/// Runs an example to its end, where that comes by itself.
async fn ends(name: &str, words: &[&str], variables: &[(&str, &str)]) -> Result<Ended> {
    let mut command = tokio::process::Command::new(program(name).await?);
    for variable in OURS {
        command.env_remove(variable);
    }
    command.args(words).envs(variables.iter().copied()).kill_on_drop(true);
    let ended = tokio::time::timeout(PATIENCE, command.output()).await;
    let Output { status, stdout, stderr } = ended.context("it did not end")??;
    let [output, errors] = [String::from_utf8(stdout)?, String::from_utf8(stderr)?];
    Ok(Ended { code: status.code(), output, errors })
}

/// Asks it to stop, and waits until it has.
async fn stop(process: &Process) -> Result<()> {
    process.signal(Signal::SIGTERM)?;
    succeeds(process).await
}

/// Waits until it ends well.
async fn succeeds(process: &Process) -> Result<()> {
    let status = process.end(PATIENCE).await?;
    ensure!(status.success(), "it ended by {status}: {:?}", process.lines());
    Ok(())
}

/// The address that it says it listens on.
async fn address(process: &Process) -> Result<String> {
    let line = process.line_with("listening on http://", PATIENCE).await?;
    Ok(line.rsplit_once("http://").context("an address")?.1.to_owned())
}

/// The number that a query gives.
async fn number(url: &str, sql: &str) -> Result<i64> {
    let mut connection = MySqlConnection::connect(url).await?;
    let sql = AssertSqlSafe(sql.to_owned());
    let number = sqlx::query_scalar(sql).fetch_one(&mut connection).await?;
    connection.close().await?;
    Ok(number)
}

/// Waits until a query gives this number.
async fn until(url: &str, sql: &str, expected: i64) -> Result<()> {
    let start = tokio::time::Instant::now();
    loop {
        let found = number(url, sql).await?;
        if found == expected {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "{found} instead of {expected}: {sql}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn unit_testing_makes_sure_of_all_three_ways() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let process = run("unit_testing", folder.path(), &[]).await?;
    process.line_with("every check passed", PATIENCE).await?;
    succeeds(&process).await?;
    let ways = ["1. ", "2. ", "3. "];
    let told = |way: &str| process.lines().iter().any(|line| line.starts_with(way));
    ensure!(ways.iter().all(|way| told(way)), "{:?}", process.lines());
    Ok(())
}

/// Runs an example that needs nothing, and looks for a line of it.
async fn tells(name: &str, line: &str) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let process = run(name, folder.path(), &[]).await?;
    process.line_with(line, PATIENCE).await?;
    succeeds(&process).await
}

#[tokio::test]
async fn a_broker_of_ones_own_delivers_in_order() -> Result<()> {
    tells("custom_broker", "delivered: 4").await
}

#[tokio::test]
async fn a_store_of_ones_own_delivers_what_was_committed() -> Result<()> {
    tells("custom_store", "published, in order: placed, paid").await
}
