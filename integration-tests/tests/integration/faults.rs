//! The whole path while parts of it stop, break and come back.

mod cut;
mod hot_key;
mod outages;
mod partial;
mod refused;
mod sharing;
mod stopped;

use anyhow::{Result, ensure};

use crate::scenario::World;

/// Fails if an attempt was counted, or a message held or dead: no outage may do that.
async fn no_attempt_is_counted(world: &World<'_>) -> Result<()> {
    let touched = "SELECT (SELECT COUNT(*) FROM outbox WHERE attempts > 0 OR held_at IS NOT NULL) \
                   + (SELECT COUNT(*) FROM outbox_dead)";
    let touched = world.number(touched).await?;
    ensure!(touched == 0, "{touched} messages with an attempt, held or dead");
    Ok(())
}
