//! What arrives in the log, and where.

use std::time::Duration;

use outbox_core::broker::{Broker, Outcome, Outgoing, PublishErrorKind};
use outbox_core::delivery::RowState;
use outbox_core::{Delivery, Dispatcher, Lane, Message, Position};
use outbox_testing::MemoryStore;

use crate::cluster::{Cluster, TOPIC, kinds, message, outgoing, publish, publish_all};

#[tokio::test(flavor = "multi_thread")]
async fn a_message_arrives_byte_for_byte() {
    let cluster = Cluster::new(1);
    let binary: Vec<u8> = (0..=255).collect();
    let message = Message::builder(TOPIC)
        .key(binary.clone())
        .payload(binary.clone())
        .header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
        .header("binary", binary.clone())
        .null_header("null")
        .header("empty", "")
        .header("twice", "1")
        .header("twice", "2")
        .build()
        .unwrap();
    let id = message.id().to_string();
    let outcomes = publish(&cluster.broker(), [message]).await;
    let [Outcome::Delivered(receipt)] = outcomes[..] else { panic!("{outcomes:?}") };
    assert_eq!((receipt.partition, receipt.offset), (Some(0), Some(0)));

    let log = cluster.log();
    let [record] = &log[..] else { panic!("{log:?}") };
    assert_eq!(record.key, Some(binary.clone()));
    assert_eq!(record.payload, Some(binary.clone()));
    let traceparent = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_vec();
    let expected = [
        ("outbox-id", Some(id.into_bytes())),
        ("traceparent", Some(traceparent)),
        ("binary", Some(binary)),
        ("null", None),
        ("empty", Some(Vec::new())),
        ("twice", Some(b"1".to_vec())),
        ("twice", Some(b"2".to_vec())),
    ];
    assert_eq!(record.headers, expected.map(|(name, value)| (name.to_owned(), value)));
}

#[tokio::test(flavor = "multi_thread")]
async fn null_and_empty_keys_and_payloads_stay_apart() {
    let cluster = Cluster::new(1);
    let build = |builder: outbox_core::message::MessageBuilder| builder.build().unwrap();
    let messages = [
        build(Message::builder(TOPIC).tombstone()),
        build(Message::builder(TOPIC).payload("")),
        build(Message::builder(TOPIC).key("").tombstone()),
        build(Message::builder(TOPIC).key("").payload("")),
    ];
    let broker = cluster.broker();
    for message in messages {
        assert_eq!(kinds(&publish(&broker, [message]).await), [None]);
    }
    let found: Vec<_> = cluster.log().into_iter().map(|r| (r.key, r.payload)).collect();
    let empty = || Some(Vec::new());
    assert_eq!(found, [(None, None), (None, empty()), (empty(), None), (empty(), empty())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_retried_out_of_its_place_says_so() {
    let cluster = Cluster::new(1);
    let delivery = Delivery::new(Position::START, Lane(0), message("k", "p"))
        .with_state(RowState::default().with_retried(true));
    let not_after = tokio::time::Instant::now() + Duration::from_secs(60);
    publish_all(&cluster.broker(), vec![Outgoing::new(delivery, not_after)]).await;
    let header = ("outbox-retried".to_owned(), Some(b"true".to_vec()));
    assert!(cluster.log()[0].headers.contains(&header));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_explicit_partition_is_kept() {
    let cluster = Cluster::new(4);
    let to = |partition| {
        Message::builder(TOPIC).key("k").payload("p").partition(partition).build().unwrap()
    };
    let outcomes = publish(&cluster.broker(), (0..4).map(to)).await;
    assert_eq!(kinds(&outcomes), [None; 4]);
    let partitions: Vec<_> = cluster.log().iter().map(|record| record.partition).collect();
    assert_eq!(partitions, [0, 1, 2, 3]);
}

/// The hashes are those of Java's `Utils.murmur2`, from the tests of Apache Kafka.
#[tokio::test(flavor = "multi_thread")]
async fn keys_map_to_partitions_as_in_java() {
    const PARTITIONS: i32 = 97;
    let vectors: [(&str, i32); 7] = [
        ("21", -973_932_308),
        ("foobar", -790_332_482),
        ("a-little-bit-long-string", -985_981_536),
        ("a-little-bit-longer-string", -1_486_304_829),
        ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
        ("abc", 479_470_107),
        ("", 275_646_681),
    ];
    let cluster = Cluster::new(PARTITIONS);
    let broker = cluster.broker();
    // Until the partition count is known a message has no partition to be asserted on.
    broker.check().await.unwrap();
    for (key, hash) in vectors {
        let outcomes = publish(&broker, [message(key, "p")]).await;
        let [Outcome::Delivered(receipt)] = outcomes[..] else { panic!("{outcomes:?}") };
        assert_eq!(receipt.partition, Some((hash & 0x7fff_ffff) % PARTITIONS), "{key:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_a_batch_keep_their_order() {
    let cluster = Cluster::new(1);
    let messages: Vec<_> = (0..2_000).map(|n| message("k", &n.to_string())).collect();
    let outcomes = publish(&cluster.broker(), messages).await;
    assert_eq!(kinds(&outcomes), vec![None; 2_000]);
    let expected: Vec<_> = (0..2_000).map(|n| n.to_string()).collect();
    assert_eq!(cluster.payloads(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overdue_message_is_not_sent() {
    let cluster = Cluster::new(1);
    let mut late = outgoing(message("late", "late"));
    late.not_after = tokio::time::Instant::now();
    let batch = vec![outgoing(message("a", "a")), late, outgoing(message("b", "b"))];
    let outcomes = publish_all(&cluster.broker(), batch).await;
    assert_eq!(kinds(&outcomes), [None, Some(PublishErrorKind::NotSent), None]);
    assert_eq!(cluster.payloads(), ["a", "b"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oversize_message_is_rejected_before_it_is_sent() {
    let cluster = Cluster::new(1);
    let broker = cluster.builder().max_message_bytes(1_000).build().unwrap();
    let large = message("k", &"x".repeat(1_000));
    let outcomes = publish(&broker, [message("a", "a"), large, message("b", "b")]).await;
    assert_eq!(kinds(&outcomes), [None, Some(PublishErrorKind::Rejected), None]);
    assert_eq!(cluster.payloads(), ["a", "b"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_largest_message_that_the_profile_allows_is_delivered() {
    let cluster = Cluster::new(1);
    let broker = cluster.broker();
    let most = broker.profile().max_message_bytes;
    for headers in [0, 64] {
        let of = |payload: usize| {
            let mut message = Message::builder(TOPIC).key("k").payload("x".repeat(payload));
            for number in 0..headers {
                message = message.header(format!("h{number}"), "value");
            }
            message.build().expect("message")
        };
        let largest = of(most - of(0).size());
        assert_eq!(largest.size(), most);
        // With each header that the broker adds.
        let mut retried = outgoing(largest);
        retried.delivery.state = RowState::default().with_retried(true);
        assert_eq!(kinds(&publish_all(&broker, vec![retried]).await), [None], "{headers} headers");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_its_topic_does_not_have_is_that_messages_own_affair() {
    let cluster = Cluster::new(3);
    cluster.mock.broker_round_trip_time(1, Duration::from_millis(500)).unwrap();
    let broker = cluster.broker();
    let astray = || Message::builder(TOPIC).key("b").payload("b").partition(9).build().unwrap();
    // Before the topic is known it may as well be the topic that is missing.
    for kind in [PublishErrorKind::Unknown, PublishErrorKind::Failed, PublishErrorKind::Failed] {
        let outcomes = publish(&broker, [message("a", "a"), astray(), message("c", "c")]).await;
        assert_eq!(kinds(&outcomes), [None, Some(kind), None]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dispatcher_that_ran_until_nothing_was_left_runs_again() {
    let (cluster, store) = (Cluster::new(1), MemoryStore::new());
    let dispatcher = Dispatcher::builder(store.clone(), cluster.broker())
        .lease(Duration::from_secs(180))
        .build()
        .unwrap();
    for payload in ["first", "second"] {
        let mut tx = store.begin();
        store.outbox().add(&mut tx, message("k", payload)).await.unwrap();
        tx.commit();
        let run = tokio::time::timeout(Duration::from_secs(60), dispatcher.run_until_empty());
        assert_eq!(run.await.expect("it ends").unwrap().delivered, 1);
    }
    assert_eq!(cluster.payloads(), ["first", "second"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_that_is_dropped_still_answers() {
    let cluster = Cluster::new(1);
    let broker = cluster.broker();
    let batch = [outgoing(message("k", "p"))];
    let outcomes = crate::cluster::sink(1);
    let publish = broker.publish(batch.into(), &outcomes);
    assert!(tokio::time::timeout(Duration::ZERO, publish).await.is_err(), "it was not dropped");
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while outcomes.unanswered() > 0 {
        assert!(std::time::Instant::now() < deadline, "the answer is lost");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(kinds(&crate::cluster::sorted(&outcomes)), [None]);
}
