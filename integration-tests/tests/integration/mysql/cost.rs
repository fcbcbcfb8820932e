//! What delivered rows cost that the server has not purged yet.
//!
//! `OUTBOX_COST_ROWS` says how many; 20,000 without it.

use std::env;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::ensure;
use integration_tests::database::Options;
use integration_tests::servers::Backend;
use outbox_core::Dispatcher;
use outbox_core::observe::{Event, Observer, Step};
use outbox_testing::MemoryBroker;

use super::traffic::until_empty;
use super::*;

/// Longer than the test: every row is inside the grace all the time.
const GRACE: Duration = Duration::from_secs(3_600);

/// A claim with nothing else going on may become slower by this factor.
const BOUND: f64 = 1.1;

/// And so may a dispatcher's claim beside its traffic. On a fast machine MariaDB is at 1.2 to 1.5,
/// after 20,000 rows as after 300,000, though the claim alone is at 1. Claims that pass the delivered
/// rows are at 2.1 and more.
const BUSY_BOUND: f64 = 1.8;

/// Noise only ever adds to a ratio of medians, or takes from it: one good round is proof.
const ROUNDS: usize = 8;
const MESSAGES_A_ROUND: usize = 150;
const CLAIMS_A_ROUND: usize = 300;

fn rows() -> usize {
    let given = env::var("OUTBOX_COST_ROWS").ok();
    given.map_or(20_000, |text| text.parse().expect("OUTBOX_COST_ROWS is a number"))
}

/// How long each claim of a dispatcher took.
#[derive(Clone, Default)]
struct Claims(Arc<Mutex<Vec<Duration>>>);

impl Observer for Claims {
    fn observe(&self, event: &Event) {
        if let Event::Timed { step: Step::Claim, took } = event {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(*took);
        }
    }
}

impl Claims {
    fn take(&self) -> Vec<Duration> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn median(&self) -> Duration {
        let mut all = self.take();
        all.sort_unstable();
        all[all.len() / 2]
    }
}

/// A dispatcher that runs until the test ends.
fn start(lab: &Lab) -> Result<Claims> {
    let claims = Claims::default();
    let store = MySqlStore::from_options(lab.url.parse()?, &lab.schema);
    let dispatcher = Dispatcher::builder(store, MemoryBroker::new())
        .grace(GRACE)
        .poll(Duration::from_millis(5), Duration::from_millis(5))
        .observer(claims.clone())
        .build()?;
    tokio::spawn(dispatcher.run(std::future::pending()));
    Ok(claims)
}

/// The median time of pages behind the last row, read in turns from two outboxes.
async fn claims_in_turns(labs: [&Lab; 2]) -> Result<[Duration; 2]> {
    let all = lanes(16);
    let mut ends = [Position::START; 2];
    for (lab, end) in labs.iter().zip(&mut ends) {
        let mut connection = lab.connect().await?;
        let next = "SELECT CAST(AUTO_INCREMENT AS SIGNED) FROM information_schema.tables \
                    WHERE table_schema = DATABASE() AND table_name = 'outbox'";
        // MySQL shows what it remembers of a table, for a day, unless it was analysed since.
        run(&mut connection, "ANALYZE TABLE outbox").await?;
        *end = Position(u64::try_from(number(&mut connection, next).await?)? - 1);
    }
    let mut took = [const { Vec::new() }; 2];
    for _ in 0..CLAIMS_A_ROUND {
        for ((lab, end), took) in labs.iter().zip(ends).zip(&mut took) {
            let began = Instant::now();
            lab.store.claim(Claim::new(1 << 20).page(Page::new(&all, end, 1_000))).await?;
            took.push(began.elapsed());
        }
    }
    Ok(took.map(|mut took| {
        took.sort_unstable();
        took[took.len() / 2]
    }))
}

async fn delivered_rows_that_are_not_purged_do_not_slow_a_claim(engine: Engine) -> Result<()> {
    if Backend::Database(engine).is_left_out() {
        return Ok(());
    }
    let server = Database::private(engine, Options::fast()).await?;
    let fresh = Lab::at(&server, MySqlSchema::new()).await?;
    let used = Lab::at(&server, MySqlSchema::new()).await?;
    // An old snapshot keeps the server from purging what is deleted.
    let mut snapshot = used.connect().await?;
    run(&mut snapshot, "START TRANSACTION WITH CONSISTENT SNAPSHOT; SELECT COUNT(*) FROM outbox")
        .await?;
    let (fresh_claims, used_claims) = (start(&fresh)?, start(&used)?);
    let rows = rows();
    for first in (0..rows).step_by(2_000) {
        let chunk = first..rows.min(first + 2_000);
        used.add(chunk.map(|n| message(&n.to_string())).collect()).await?;
    }
    until_empty(&used).await?;
    // The same trickle for both at once: whatever disturbs one disturbs the other.
    let (mut alone, mut busy) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..ROUNDS {
        fresh_claims.take();
        used_claims.take();
        for n in 0..MESSAGES_A_ROUND {
            let key = n.to_string();
            tokio::try_join!(fresh.add(vec![message(&key)]), used.add(vec![message(&key)]))?;
        }
        let by_dispatchers = [fresh_claims.median(), used_claims.median()];
        for lab in [&fresh, &used] {
            until_empty(lab).await?;
        }
        let by_stores = claims_in_turns([&fresh, &used]).await?;
        let ratio = |[fresh, used]: [Duration; 2]| used.as_secs_f64() / fresh.as_secs_f64();
        (alone, busy) = (alone.min(ratio(by_stores)), busy.min(ratio(by_dispatchers)));
        println!(
            "{engine}: a claim takes {by_stores:?} alone and {by_dispatchers:?} beside traffic, the \
             second after {rows} delivered rows: {alone:.3}, {busy:.3}"
        );
        if alone < BOUND && busy < BUSY_BOUND {
            break;
        }
    }
    ensure!(alone < BOUND, "claims are slower by the factor {alone:.3}");
    ensure!(busy < BUSY_BOUND, "claims beside traffic are slower by the factor {busy:.3}");
    run(&mut snapshot, "COMMIT").await
}

on_each! {
    delivered_rows_that_are_not_purged_do_not_slow_a_claim
}
