//! A relay that has nothing to do.

use std::time::Duration;

use anyhow::Result;
use outbox_kafka::KafkaBroker;

use crate::{
    lab::Lab,
    relay::Relay,
    report::Page,
    site::{Site, status},
};

pub(crate) async fn run(lab: &Lab) -> Result<Page> {
    let mut page = Page::new("Idle");
    let time = lab.pick(Duration::from_secs(2), Duration::from_secs(60));
    page.say(format!(
        "One relay on an empty outbox for {} s after it came to rest. What server and Kafka use \
         without a relay, measured for as long, is taken off.",
        time.as_secs()
    ));
    let mut rows = vec![];
    for engine in lab.engines() {
        let site = Site::new(lab, engine).await?;
        let kafka = lab.kafka().await?;
        let mut connection = site.connect().await?;
        let mut measured = vec![];
        for with_relay in [false, true] {
            let broker = KafkaBroker::builder(kafka.bootstrap()).build()?;
            let relay = if with_relay { Some(Relay::start(&site, broker, |b| b)?) } else { None };
            // The interval grows to its longest within seconds.
            let rest = if with_relay { Duration::from_secs(6) } else { Duration::from_secs(1) };
            tokio::time::sleep(rest).await;
            let (cpu, questions) =
                (lab.cpu(engine).await?, status(&mut connection, "Questions").await?);
            tokio::time::sleep(time).await;
            // Without the question for the counter itself.
            let asked = status(&mut connection, "Questions").await? - questions - 1;
            let cpu = lab.cpu(engine).await? - cpu;
            measured.push((asked as f64 / time.as_secs_f64(), cpu));
            if let Some(relay) = relay {
                relay.stop().await?;
            }
        }
        let ((quiet, before), (asked, cpu)) = (measured[0], measured[1]);
        let queries = asked - quiet;
        let core = |seconds: f64| 100.0 * seconds / time.as_secs_f64();
        let ours = core(cpu.relay + cpu.client - before.relay - before.client);
        let database = core(cpu.database - before.database);
        lab.progress(format!("{engine}: {queries:.1} queries/s, {ours:.2} % of a core"));
        rows.push([
            engine.to_string(),
            format!("{queries:.1}"),
            format!("{ours:.2} %"),
            format!("{database:.2} %"),
            format!("{:.2} %", core(cpu.kafka - before.kafka)),
        ]);
        page.verdict(
            format!("{engine}: queries a second of an idle relay"),
            format!("{queries:.1}"),
            "<= 5",
            queries <= 5.0,
        );
        page.verdict(
            format!("{engine}: of a core, idle"),
            format!("{ours:.2} %"),
            "< 1 %",
            ours < 1.0,
        );
    }
    page.table(["", "queries/s", "relay and librdkafka", "database", "Kafka"], &rows);
    Ok(page)
}
