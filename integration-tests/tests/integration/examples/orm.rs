//! `orm`: sea-orm, diesel and plain SQL beside one outbox.

use anyhow::{Result, ensure};
use integration_tests::database::Engine;
use integration_tests::servers;

use super::{PATIENCE, run, succeeds};

async fn publishes_what_was_committed_through_each(engine: Engine) -> Result<()> {
    let Some(server) = servers::database_of(engine).await else { return Ok(()) };
    let url = server.create_database().await?;
    let folder = tempfile::tempdir()?;
    let process = run("orm", folder.path(), &[("DATABASE_URL", &url)]).await?;
    succeeds(&process).await?;
    for order in ["sea-1", "diesel-1", "plain-1"] {
        process.line_with(&format!("published: {order}: placed"), PATIENCE).await?;
    }
    let ghost = process.lines().into_iter().find(|line| line.contains("rolled-back"));
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
