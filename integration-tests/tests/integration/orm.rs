//! The example `orm` as a user runs it, on both servers: sea-orm, diesel and plain SQL beside one
//! outbox.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::database::Engine;
use integration_tests::process::Process;
use integration_tests::servers;

const PATIENCE: Duration = Duration::from_secs(120);

/// The example's program. `cargo test --workspace` has built it with the same features just before;
/// a narrower run of tests has not.
fn program() -> Result<PathBuf> {
    let built = Command::new(env!("CARGO"))
        .args(["build", "--workspace", "--examples", "--quiet"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null())
        .status()?;
    ensure!(built.success(), "the examples do not build");
    let test = std::env::current_exe()?;
    let folder = test.ancestors().nth(2).context("the folder of this profile")?;
    Ok(folder.join("examples/orm"))
}

async fn publishes_what_was_committed_through_each(engine: Engine) -> Result<()> {
    let Some(server) = servers::database_of(engine).await else { return Ok(()) };
    let url = server.create_database().await?;
    let program = tokio::task::spawn_blocking(program).await??;
    let run = Process::spawn(program, [] as [&str; 0], [("DATABASE_URL", &url)])?;
    let status = run.end(PATIENCE).await?;
    ensure!(status.success(), "{status}: {:?}", run.lines());
    for order in ["sea-1", "diesel-1", "plain-1"] {
        run.line_with(&format!("published: {order}: placed"), PATIENCE).await?;
    }
    let ghost = run.lines().into_iter().find(|line| line.contains("rolled-back"));
    ensure!(ghost.is_none(), "a message that was rolled back is published: {ghost:?}");
    Ok(())
}

#[tokio::test]
async fn each_way_adds_what_it_commits_on_mariadb() -> Result<()> {
    publishes_what_was_committed_through_each(Engine::MariaDb).await
}

#[tokio::test]
async fn each_way_adds_what_it_commits_on_mysql() -> Result<()> {
    publishes_what_was_committed_through_each(Engine::MySql).await
}
