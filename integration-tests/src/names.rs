//! Names that no other test, process or earlier run has.

/// `<prefix>-<random>`, for topics, folders and containers.
#[must_use]
pub fn unique(prefix: &str) -> String {
    format!("{prefix}-{:012x}", rand::random::<u64>() >> 16)
}
