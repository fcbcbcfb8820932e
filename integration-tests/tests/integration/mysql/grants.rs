//! What `docs/running.md` has as SQL: its grants suffice, each for its own work, and its query finds
//! what it is for.

use std::sync::Arc;

use integration_tests::servers;
use outbox_core::broker::PublishErrorKind;
use outbox_core::dead_letters::DeadLetterQuery;
use outbox_core::delivery::{Failure, Settlement};
use outbox_core::retry::{OnDeath, Retention, TopicPolicy};
use outbox_core::store::{Failed, Settle};
use outbox_core::{DeadLetters, Dispatcher};
use outbox_mysql::MySqlInbox;
use outbox_testing::MemoryBroker;
use sqlx::Row as _;

use super::*;

const ROLES: [&str; 5] = ["writer", "relay", "operator", "consumer", "migrator"];

/// The first block of SQL under this heading of the page.
fn documented(heading: &str) -> &'static str {
    let page = include_str!("../../../../docs/running.md");
    let (_, section) = page.split_once(heading).expect("the heading");
    let (_, rest) = section.split_once("```sql\n").expect("a block of SQL");
    rest.split_once("```").expect("its end").0
}

fn grants() -> &'static str {
    documented("## Who may do what")
}

/// The URL of the lab's database for another user, without a password.
pub(super) fn url_of(lab: &Lab, user: &str) -> Result<String> {
    for_user(&lab.url, user)
}

fn for_user(url: &str, user: &str) -> Result<String> {
    let (scheme, rest) = url.split_once("://").context("a URL")?;
    let (_, place) = rest.split_once('@').context("a user")?;
    Ok(format!("{scheme}://{user}@{place}"))
}

fn database_of(url: &str) -> Result<&str> {
    let database = url.rsplit('/').next().context("a database")?;
    Ok(database.split('?').next().unwrap_or(database))
}

/// Users belong to the server: a name of the test's own.
fn user_of(role: &str, database: &str) -> String {
    format!("{role}_{}", &database[database.len().saturating_sub(12)..])
}

on_both! {
    async fn the_documented_query_finds_messages_that_are_tried_again(lab: Lab) -> Result<()> {
        let mut connection = lab.connect().await?;
        for (key, settlement) in [("a", Settlement::Retry(TTL)), ("b", Settlement::Held)] {
            let row = lab.delivery(key).await?;
            let (_, lease) = lab.take(row.lane).await?;
            let failure = Failure::new("failed", "why");
            let failed = Failed::new(id_of(&row), lease, row.state, 1, settlement, failure);
            let settled = lab.store.settle(Settle::new(&[], &[failed])).await?;
            assert_eq!(settled.refused, []);
        }
        let query = documented("## Messages that are tried again");
        let rows = sqlx::raw_sql(query).fetch_all(&mut connection).await?;
        let (attempts, error) = (rows[0].get::<u32, _>(3), rows[0].get::<String, _>(5));
        assert_eq!((rows.len(), attempts), (1, 1));
        assert!(error.starts_with("failed"), "{error}");
        Ok(())
    }

    async fn each_role_needs_no_more_than_its_grants(lab: Lab) -> Result<()> {
        let mut root = lab.connect().await?;
        let database = database_of(&lab.url)?;
        let user = |role: &str| user_of(role, database);
        for role in ROLES {
            run(&mut root, format!("CREATE USER '{}'@'%'", user(role))).await?;
        }
        let mut grants = grants().replace("shop.", &format!("{database}."));
        for role in ROLES {
            grants = grants.replace(&format!("shop_{role}"), &user(role));
        }
        run(&mut root, grants).await?;

        let mut writer = MySqlConnection::connect(&url_of(&lab, &user("writer"))?).await?;
        let mut tx = writer.begin().await?;
        let ids = lab.outbox.add_all(&mut tx, ["good", "held", "dead"].map(|key| {
            let topic = if key == "dead" { "skipped" } else { "orders" };
            Message::builder(topic).key(key).payload("p").build().expect("valid")
        })).await.context("the writer adds")?;
        tx.commit().await?;
        assert!(sqlx::query("DELETE FROM outbox").execute(&mut writer).await.is_err());

        let broker = MemoryBroker::new();
        broker.fail_when(|d| d.message.key() != Some(b"good"), PublishErrorKind::Rejected);
        let url = url_of(&lab, &user("relay"))?;
        let store = MySqlStore::connect(&url, &lab.schema).await.context("the relay opens the store")?;
        let relay = |keep: bool| {
            let store = MySqlStore::clone(&store);
            let retention = if keep { Retention::Keep(TTL) } else { Retention::Delete };
            Dispatcher::builder(store, broker.clone())
                .topic("skipped", TopicPolicy::new().on_death(OnDeath::Skip))
                .retention(retention)
                .build()
        };
        relay(true)?.run_until_empty().await.context("the relay runs")?;
        assert_eq!(broker.published().len(), 1);

        let url = url_of(&lab, &user("operator"))?;
        let operator = MySqlStore::connect(&url, &lab.schema).await.context("the operator opens the store")?;
        let operator: Arc<dyn DeadLetters> = Arc::new(operator);
        assert_eq!(operator.list(&DeadLetterQuery::new()).await?.len(), 2);
        assert!(operator.get(ids[1]).await?.is_some());
        assert_eq!(operator.skip(&[ids[1]]).await?, 1);
        assert_eq!(operator.retry(&[ids[2]]).await?, 1);
        broker.heal();
        relay(false)?.run_until_empty().await?;
        assert_eq!(broker.published().len(), 2);
        assert_eq!(operator.discard(&[ids[1]]).await?, 1);

        let mut consumer = MySqlConnection::connect(&url_of(&lab, &user("consumer"))?).await?;
        let inbox = MySqlInbox::new(&lab.schema, "mail")?;
        let mut tx = consumer.begin().await?;
        assert!(inbox.accept(&mut tx, ids[0]).await.context("the consumer accepts")?);
        tx.commit().await?;
        let purged = inbox.purge(&mut consumer, Duration::ZERO, 10).await;
        assert_eq!(purged.context("the consumer purges")?, 1);
        for role in ROLES {
            run(&mut root, format!("DROP USER '{}'@'%'", user(role))).await?;
        }
        Ok(())
    }

    async fn a_migrator_needs_no_more_than_its_grants(lab: Lab) -> Result<()> {
        let server = servers::database_of(lab.engine).await.context("the lab uses it")?;
        let url = server.create_database().await?;
        let database = database_of(&url)?;
        let user = user_of("migrator", database);
        let mut root = MySqlConnection::connect(&url).await?;
        run(&mut root, format!("CREATE USER '{user}'@'%'")).await?;
        let grants = grants().lines().filter(|line| line.contains("'shop_migrator'"));
        for grant in grants {
            let grant = grant.replace("shop.", &format!("{database}."));
            run(&mut root, grant.replace("shop_migrator", &user)).await?;
        }

        let mut migrator = MySqlConnection::connect(&for_user(&url, &user)?).await?;
        for _ in 0..2 {
            lab.schema.migrate(&mut migrator).await.context("the migrator migrates")?;
        }
        let mut tx = root.begin().await?;
        lab.outbox.add_all(&mut tx, (0..20).map(|n| message(&n.to_string()))).await?;
        tx.commit().await?;
        for lanes in [7, 2] {
            let changed = lab.schema.change_lanes(&mut migrator, lanes).await;
            changed.context("the migrator changes the number of lanes")?;
        }
        let store = MySqlStore::connect(&url, &lab.schema).await?;
        assert_eq!(store.open().await?.lanes.get(), 2);
        let broker = MemoryBroker::new();
        Dispatcher::builder(store, broker.clone()).build()?.run_until_empty().await?;
        assert_eq!(broker.published().len(), 20);
        assert!(sqlx::query("DROP TABLE outbox_dead").execute(&mut migrator).await.is_err());
        run(&mut root, format!("DROP USER '{user}'@'%'")).await?;
        Ok(())
    }
}
