//! Plain SQL, as people type it into the server's own client.

use integration_tests::servers;
use outbox_core::Dispatcher;
use outbox_testing::MemoryBroker;

use super::*;

/// The client's answer: what it printed, or what it complained about.
async fn ask(lab: &Lab, sql: &str) -> Result<Result<String, String>> {
    let server = servers::database_of(lab.engine).await.context("it is there: the lab uses it")?;
    let output = server.client(&lab.url, sql).await?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let done = output.status.success();
    Ok(if done { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) })
}

on_both! {
    async fn a_row_from_the_command_line_is_delivered_and_a_wrong_lane_is_refused(lab: Lab) -> Result<()> {
        let insert = "INSERT INTO outbox (message_id, topic, message_key, payload";
        let id = "UNHEX(REPLACE('01998f00-0000-7000-8000-0000000000aa', '-', ''))";
        let plain = format!("{insert}) VALUES ({id}, 'orders', 'Key ', '{{}}')");
        ask(&lab, &plain).await?.map_err(anyhow::Error::msg)?;
        let claimed = deliveries(lab.page().await?);
        assert_eq!(claimed.len(), 1);
        assert_eq!(claimed[0].message.id().to_string(), "01998f00-0000-7000-8000-0000000000aa");
        assert_eq!(claimed[0].message.key(), Some(&b"Key "[..]));
        assert_eq!(claimed[0].message.payload(), Some(&b"{}"[..]));

        let wrong = format!(
            "{insert}, lane) VALUES ({id}, 'orders', 'Key ', '{{}}', (CRC32('Key ') + 1) MOD 4)"
        );
        let complaint = ask(&lab, &wrong).await?.expect_err("the lane is wrong");
        assert!(complaint.contains("outbox_lane_is_of_key"), "{complaint}");
        let broker = MemoryBroker::new();
        let dispatcher = Dispatcher::builder(lab.store.clone(), broker.clone()).build()?;
        dispatcher.run_until_empty().await?;
        broker.assert_published([("orders", "Key ")]);
        assert_eq!(lab.pending().await?, []);
        Ok(())
    }

    async fn the_printed_schema_is_an_error_beside_a_table_of_others(lab: Lab) -> Result<()> {
        let schema = MySqlSchema::new().with_prefix("shop_")?;
        ask(&lab, "CREATE TABLE shop_outbox (state INT)").await?.map_err(anyhow::Error::msg)?;
        for _ in 0..2 {
            let complaint = ask(&lab, &schema.sql()).await?.expect_err("it is not ours");
            assert!(complaint.contains("ERROR 1054"), "{complaint}");
        }
        ask(&lab, "RENAME TABLE shop_outbox TO theirs").await?.map_err(anyhow::Error::msg)?;
        ask(&lab, &schema.sql()).await?.map_err(anyhow::Error::msg)?;
        schema.check(&mut lab.connect().await?).await?;
        Ok(())
    }

    async fn the_printed_schema_is_taken_by_the_command_line(lab: Lab) -> Result<()> {
        let schema = MySqlSchema::new().with_prefix("shop_")?.with_lanes(3)?;
        ask(&lab, &schema.sql()).await?.map_err(anyhow::Error::msg)?;
        schema.check(&mut lab.connect().await?).await?;
        let store = MySqlStore::connect(&lab.url, &schema).await?;
        assert_eq!(store.open().await?.lanes.get(), 3);
        Ok(())
    }
}
