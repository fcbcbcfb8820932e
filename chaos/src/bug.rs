//! Defects on purpose, in the relays: they show what chaos finds.

use anyhow::{Result, bail};

/// The variable that tells a relay its defect.
pub(crate) const VARIABLE: &str = "CHAOS_BUG";

/// Switches the defect on, for this process.
#[cfg(outbox_seeded_bug)]
pub(crate) fn choose(name: &str) -> Result<()> {
    use outbox_core::seeded::{BUGS, choose_everywhere};
    let Some((bug, _)) = BUGS.iter().find(|(listed, _)| *listed == name) else {
        let names: Vec<_> = BUGS.iter().map(|(listed, _)| *listed).collect();
        bail!("no defect is named {name:?}; there are: {}", names.join(", "));
    };
    choose_everywhere(bug);
    Ok(())
}

/// Switches the defect on, for this process.
#[cfg(not(outbox_seeded_bug))]
pub(crate) fn choose(name: &str) -> Result<()> {
    bail!("{name} is compiled only with --cfg outbox_seeded_bug")
}
