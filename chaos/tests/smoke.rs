//! A minute of chaos in every run of the tests.

use std::process::Command;

use integration_tests::{database::Engine, servers::Backend};

/// Any other seed would do.
const SEED: &str = "20261125";

#[test]
fn a_minute_of_chaos_loses_nothing_invents_nothing_and_keeps_the_order() {
    if Backend::Database(Engine::MariaDb).is_left_out() || Backend::Kafka.is_left_out() {
        return;
    }
    let keep = concat!(env!("CARGO_TARGET_TMPDIR"), "/chaos");
    let output = Command::new(env!("CARGO_BIN_EXE_chaos"))
        .args(["--for", "60s", "--every", "2s", "--rate", "300", "--engine", "mariadb"])
        .args(["--seed", SEED, "--window", "200", "--keep", keep])
        .output()
        .expect("chaos runs");
    let said = String::from_utf8_lossy(&output.stdout);
    let summary = said.lines().last().unwrap_or_default();
    let complaints = String::from_utf8_lossy(&output.stderr);
    println!("{said}{complaints}");
    assert!(output.status.success(), "{}: {summary}\n{complaints}", output.status);
    assert!(summary.starts_with("chaos: mariadb") && summary.ends_with(": ok"), "{summary}");
}
