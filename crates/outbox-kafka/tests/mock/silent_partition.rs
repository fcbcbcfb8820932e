//! A partition that does not answer.

use std::collections::BTreeSet;
use std::time::Duration;

use outbox_core::Message;
use outbox_core::broker::{Outcome, PublishErrorKind};

use crate::cluster::{Cluster, TOPIC, kind, kinds, message, publish};

const TIMEOUT: Duration = Duration::from_secs(3);

fn keys() -> impl Iterator<Item = Message> {
    (0..60).map(|key| message(&key.to_string(), "p"))
}

fn keyless() -> impl Iterator<Item = Message> {
    (0..30).map(|_| Message::builder(TOPIC).payload("p").build().expect("valid"))
}

fn indexes(outcomes: &[Outcome], wanted: impl Fn(&Outcome) -> bool) -> BTreeSet<usize> {
    let found = outcomes.iter().enumerate().filter(|(_, outcome)| wanted(outcome));
    found.map(|(index, _)| index).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_for_a_partition_that_does_not_answer_is_not_sent_but_for_one_probe() {
    let cluster = Cluster::of(2, 6);
    cluster.mock.partition_leader(TOPIC, 3, Some(2)).unwrap();
    let broker = cluster.builder().message_timeout(TIMEOUT).build().unwrap();
    let first = loop {
        let all = publish(&broker, keys()).await;
        if kinds(&all) == [None; 60] {
            break all;
        }
    };
    let to_3 = indexes(&first, |outcome| match outcome {
        Outcome::Delivered(receipt) => receipt.partition == Some(3),
        _ => false,
    });
    assert!(to_3.len() > 3, "{to_3:?}");
    cluster.mock.broker_down(2).unwrap();

    let unknown = publish(&broker, keys()).await;
    let is = |wanted| move |outcome: &Outcome| kind(outcome) == wanted;
    assert_eq!(indexes(&unknown, is(Some(PublishErrorKind::Unknown))), to_3);
    assert_eq!(indexes(&unknown, is(None)).len(), 60 - to_3.len());

    // The number of partitions is asked for beside a publish.
    let counted = async {
        while publish(&broker, keys()).await.iter().all(|o| !is(Some(PublishErrorKind::NotSent))(o))
        {
        }
    };
    tokio::time::timeout(Duration::from_secs(60), counted).await.unwrap();
    let waiting = publish(&broker, keys()).await;
    let probe = indexes(&waiting, is(Some(PublishErrorKind::Unknown)));
    let not_sent = indexes(&waiting, is(Some(PublishErrorKind::NotSent)));
    assert_eq!(probe.iter().collect::<Vec<_>>(), [to_3.first().unwrap()]);
    assert_eq!(not_sent, to_3.difference(&probe).copied().collect());
    assert_eq!(indexes(&waiting, is(None)).len(), 60 - to_3.len());

    assert!(indexes(&publish(&broker, keyless()).await, is(None)).len() >= 29, "one may probe");

    cluster.mock.broker_up(2).unwrap();
    let back = async { while kinds(&publish(&broker, keys()).await) != [None; 60] {} };
    tokio::time::timeout(Duration::from_secs(60), back).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_answers_again_gets_messages_without_a_key_again() {
    let cluster = Cluster::of(2, 2);
    cluster.mock.partition_leader(TOPIC, 1, Some(2)).unwrap();
    let broker = cluster.builder().message_timeout(TIMEOUT).build().unwrap();
    let to_1 = |outcomes: &[Outcome]| {
        outcomes.iter().any(|outcome| match outcome {
            Outcome::Delivered(receipt) => receipt.partition == Some(1),
            _ => false,
        })
    };
    let some_to_1 = async { while !to_1(&publish(&broker, keyless()).await) {} };
    tokio::time::timeout(Duration::from_secs(60), some_to_1).await.unwrap();
    cluster.mock.broker_down(2).unwrap();
    let delivered = |outcomes: &[Outcome]| kinds(outcomes).iter().filter(|k| k.is_none()).count();
    let elsewhere = async { while delivered(&publish(&broker, keyless()).await) < 29 {} };
    tokio::time::timeout(Duration::from_secs(60), elsewhere).await.unwrap();

    cluster.mock.broker_up(2).unwrap();
    let back = async { while !to_1(&publish(&broker, keyless()).await) {} };
    tokio::time::timeout(Duration::from_secs(60), back).await.expect("it is left out for ever");
}
