//! The change of the number of lanes.

use std::time::Instant;

use outbox_core::dead_letters::DeadLetters;
use outbox_core::delivery::{Failure, Settlement};
use outbox_core::store::{Failed, Settle, StoreErrorKind};

use super::traffic::{Relays, Writers};
use super::*;

/// Rows whose lane is not that of their key.
async fn strays(lab: &Lab, lanes: u16) -> Result<i64> {
    let sql = format!(
        "SELECT COUNT(*) FROM outbox WHERE lane <> CRC32(COALESCE(message_key, message_id)) MOD {lanes}"
    );
    number(&mut lab.connect().await?, &sql).await
}

/// The definition of the outbox table, line by line in no order.
async fn definition(connection: &mut MySqlConnection) -> Result<Vec<String>> {
    let (_, text): (String, String) =
        sqlx::query_as("SHOW CREATE TABLE outbox").fetch_one(connection).await?;
    let lines = text.lines().map(|line| line.trim().trim_end_matches(',').to_owned());
    let mut lines: Vec<_> = lines.filter(|line| !line.starts_with(") ENGINE")).collect();
    lines.sort();
    Ok(lines)
}

on_both! {
    async fn lanes_change_under_running_writers_and_dispatchers(lab: Lab) -> Result<()> {
        let relays = Relays::start(&lab, 2)?;
        let writers = Writers::start(&lab, 4).await?;
        let mut connection = lab.connect().await?;
        for lanes in [7, 2] {
            relays.progress(50).await;
            lab.schema.change_lanes(&mut connection, lanes).await?;
            let now = number(&mut connection, "SELECT CAST(lanes AS SIGNED) FROM outbox_meta");
            assert_eq!(now.await?, i64::from(lanes));
        }
        relays.progress(50).await;
        let written = writers.stop().await?;
        assert_eq!(strays(&lab, 2).await?, 0);
        written.judge(&lab, relays).await
    }

    async fn a_changed_table_is_defined_as_a_new_one_with_as_many_lanes(lab: Lab) -> Result<()> {
        lab.add((0..50).map(|n| message(&n.to_string())).collect()).await?;
        let mut connection = lab.connect().await?;
        lab.schema.change_lanes(&mut connection, 9).await?;
        assert_eq!(strays(&lab, 9).await?, 0);
        assert_eq!(number(&mut connection, "SELECT COUNT(*) FROM outbox").await?, 50);
        let Some(new) = Lab::with_schema(lab.engine, MySqlSchema::new().with_lanes(9)?).await?
        else { return Ok(()) };
        let expected = definition(&mut new.connect().await?).await?;
        assert_eq!(definition(&mut connection).await?, expected);
        let wait = number(&mut connection, "SELECT CAST(@@lock_wait_timeout AS SIGNED)").await?;
        let default = number(&mut connection, "SELECT CAST(@@GLOBAL.lock_wait_timeout AS SIGNED)");
        assert_eq!(wait, default.await?, "the session is not as it was");
        Ok(())
    }

    async fn a_held_row_stays_held_in_its_place_when_lanes_change(lab: Lab) -> Result<()> {
        let held = lab.delivery("a").await?;
        let (_, lease) = lab.take(held.lane).await?;
        let failure = Failure::new("failed", "why");
        let row =
            Failed::new(id_of(&held), lease, held.state, 1, Settlement::Held, failure);
        assert_eq!(lab.store.settle(Settle::new(&[], &[row])).await?.refused, []);
        lab.schema.change_lanes(&mut lab.connect().await?, 1).await?;
        let letter = lab.store.get(held.message.id()).await?.context("it is not held any more")?;
        assert_eq!((letter.position, letter.attempts), (held.position, 1));
        let now = deliveries(lab.page().await?);
        assert_eq!((now[0].position, now[0].lane, now[0].state.held), (held.position, Lane(0), true));
        assert_eq!(lab.store.retry(&[held.message.id()]).await?, 1);
        Ok(())
    }

    async fn former_owners_are_waited_for_and_fenced_off(lab: Lab) -> Result<()> {
        let row = lab.delivery("a").await?;
        let start = Instant::now();
        let (worker, lease) = lab.take(row.lane).await?;
        lab.schema.change_lanes(&mut lab.connect().await?, 5).await?;
        assert!(start.elapsed() >= TTL, "{:?}", start.elapsed());
        let failure = Failure::new("failed", "why");
        let failed = Failed::new(id_of(&row), lease, row.state, 1, Settlement::Dead, failure);
        let settled = lab.store.settle(Settle::new(&[], &[failed])).await?;
        assert_eq!(settled.refused, [row.position]);
        let renew = [lease];
        let standing = lab.store.keep_leases(KeepLeases::new(worker, TTL).renew(&renew)).await?;
        assert_eq!(standing.lanes.len(), 5);
        assert!(standing.lanes.iter().all(|lane| lane.owner.is_none()));
        Ok(())
    }

    async fn former_owners_are_not_waited_for_longer_than_their_lease_after_a_step_of_the_clock(
        lab: Lab
    ) -> Result<()> {
        lab.take(Lane(0)).await?;
        let mut connection = lab.connect().await?;
        let later = "UPDATE outbox_lane SET expires_at = expires_at + INTERVAL 1 DAY";
        sqlx::query(later).execute(&mut connection).await?;
        let changed = lab.schema.change_lanes(&mut connection, 5);
        tokio::time::timeout(Duration::from_secs(30), changed).await.context("a day")??;
        Ok(())
    }

    async fn epochs_of_lanes_that_went_and_came_back_have_grown(lab: Lab) -> Result<()> {
        let (_, before) = lab.take(Lane(3)).await?;
        let mut connection = lab.connect().await?;
        for lanes in [2, 4] {
            lab.schema.change_lanes(&mut connection, lanes).await?;
        }
        let (_, after) = lab.take(Lane(3)).await?;
        assert!(after.epoch > before.epoch, "{after:?}");
        Ok(())
    }

    async fn an_interrupted_change_is_told_and_can_be_run_again(lab: Lab) -> Result<()> {
        lab.add((0..20).map(|n| message(&n.to_string())).collect()).await?;
        // An open transaction keeps the table from being altered.
        let mut writer = lab.connect().await?;
        let mut tx = writer.begin().await?;
        lab.outbox.add(&mut tx, message("open")).await?;
        let mut connection = lab.connect().await?;
        let change = lab.schema.change_lanes(&mut connection, 8);
        tokio::time::timeout(Duration::from_secs(3), change).await.expect_err("it waits");
        drop(connection);
        tx.commit().await?;

        let refused = lab.store.open().await.expect_err("it was interrupted");
        assert_eq!(refused.kind(), StoreErrorKind::Schema);
        let cause = std::error::Error::source(&refused).context("no cause")?.to_string();
        assert!(cause.ends_with("was interrupted: run change_lanes again"), "{cause}");
        let worker = WorkerId::generate();
        let standing = lab.store.keep_leases(KeepLeases::new(worker, TTL)).await?;
        let take: Vec<_> = standing.lanes.iter().map(TakeOver::of).collect();
        let standing = lab.store.keep_leases(KeepLeases::new(worker, TTL).take(&take)).await?;
        assert!(!standing.lanes.is_empty());
        assert!(standing.lanes.iter().all(|lane| lane.owner != Some(worker)), "a lane was free");

        lab.schema.change_lanes(&mut lab.connect().await?, 8).await?;
        assert_eq!(lab.store.open().await?.lanes.get(), 8);
        assert_eq!(strays(&lab, 8).await?, 0);
        assert_eq!(lab.pending().await?.len(), 21);
        Ok(())
    }

    async fn a_change_that_stopped_without_the_check_can_be_run_again(lab: Lab) -> Result<()> {
        lab.add((0..20).map(|n| message(&n.to_string())).collect()).await?;
        let mut connection = lab.connect().await?;
        let before = definition(&mut connection).await?;
        run(&mut connection, "UPDATE outbox_meta SET lanes = NULL; \
             ALTER TABLE outbox DROP CONSTRAINT outbox_lane_is_of_key").await?;
        lab.schema.change_lanes(&mut connection, 8).await?;
        assert_eq!(lab.store.open().await?.lanes.get(), 8);
        assert_eq!(strays(&lab, 8).await?, 0);
        assert_eq!(definition(&mut connection).await?.len(), before.len());
        Ok(())
    }

    async fn a_number_of_lanes_that_cannot_be_changes_nothing(lab: Lab) -> Result<()> {
        let mut connection = lab.connect().await?;
        for lanes in [0, 1025] {
            let changed = lab.schema.change_lanes(&mut connection, lanes).await;
            assert_eq!(changed.map_err(|error| error.kind()), Err(StoreErrorKind::Invalid));
        }
        assert_eq!(lab.store.open().await?.lanes.get(), 4);
        Ok(())
    }

    async fn a_change_that_fails_leaves_no_lock_behind(lab: Lab) -> Result<()> {
        let (worker, lease) = lab.take(Lane(0)).await?;
        let mut connection = lab.connect().await?;
        let before: i64 = number(&mut connection, "SELECT CAST(@@lock_wait_timeout AS SIGNED)").await?;
        // It fails within its first transaction, which has locked the lanes by then.
        run(&mut connection, "ALTER TABLE outbox_meta ADD CHECK (lanes IS NOT NULL)").await?;
        lab.schema.change_lanes(&mut connection, 7).await.expect_err("the table forbids it");
        let renew = [lease];
        let keep = lab.store.keep_leases(KeepLeases::new(worker, TTL).renew(&renew));
        tokio::time::timeout(Duration::from_secs(30), keep).await.context("it waits")??;
        let after = "SELECT CAST(@@lock_wait_timeout AS SIGNED)";
        assert_eq!(number(&mut connection, after).await?, before);
        Ok(())
    }

    async fn lanes_change_in_a_session_that_is_safe_from_updates(lab: Lab) -> Result<()> {
        lab.add((0..20).map(|n| message(&n.to_string())).collect()).await?;
        let mut connection = lab.connect().await?;
        run(&mut connection, "SET sql_safe_updates = 1").await?;
        lab.schema.change_lanes(&mut connection, 7).await?;
        assert_eq!(number(&mut connection, "SELECT @@sql_safe_updates").await?, 1);
        assert_eq!(strays(&lab, 7).await?, 0);
        Ok(())
    }

    async fn lanes_change_in_a_session_of_any_sql_mode(lab: Lab) -> Result<()> {
        lab.add((0..20).map(|n| message(&n.to_string())).collect()).await?;
        let mut connection = lab.connect().await?;
        let mut modes = vec!["", "ANSI"];
        if lab.engine == Engine::MariaDb {
            modes.push("ORACLE");
        }
        for (lanes, mode) in (7..).zip(modes) {
            run(&mut connection, format!("SET sql_mode = '{mode}'")).await?;
            lab.schema.change_lanes(&mut connection, lanes).await.context(mode)?;
            assert_eq!(lab.store.open().await?.lanes.get(), lanes, "{mode}");
            assert_eq!(strays(&lab, lanes).await?, 0, "{mode}");
        }
        Ok(())
    }
}
