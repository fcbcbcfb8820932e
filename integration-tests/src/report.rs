//! Lines that a person must see: which servers the tests ran on, and which were left out.

use std::io::Write;

/// Prints one line on standard error, past the capture of the test harness.
///
/// `eprintln!` in a test that passes is swallowed; a rung that nobody can see would be a silent
/// skip.
pub(crate) fn line(text: &str) {
    // A closed standard error is no reason to fail a test.
    let _ = writeln!(std::io::stderr().lock(), "outbox-tests: {text}");
}
