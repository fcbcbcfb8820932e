//! A relay for tests to kill; the variables that tell it what to do are those of its `run`.

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    integration_tests::relay::run().await
}
