//! How a failing case speaks: which line of the contract is broken, and what was found instead.

use std::time::Duration;

use outbox_core::broker::{Outcome, PublishErrorKind};

use crate::Published;

/// Beyond what a broker or a caller allows itself, for a busy machine.
const SLACK: Duration = Duration::from_millis(500);

/// The output of a call of a broker. A call that never ends fails its case and does not hang it.
pub(super) async fn in_time<T>(call: &str, limit: Duration, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(limit + SLACK, future).await {
        Ok(output) => output,
        Err(_) => panic!(
            "{call} has not ended after {:?}: it may take {limit:?}. Give each request a shorter \
             timeout; when a batch takes long, stop handing over and answer the rest NotSent",
            limit + SLACK
        ),
    }
}

/// Asserts that a message was answered as delivered; `why` it must be ends the sentence.
#[track_caller]
pub(super) fn assert_delivered(answers: &[Option<Outcome>], index: usize, why: &str) {
    let answer = &answers[index];
    let delivered = matches!(answer, Some(Outcome::Delivered(_)));
    assert!(delivered, "message {index} must be delivered, {why}; it is {}", in_words(answer));
}

/// Asserts that a message was answered as failed, of this kind; `why` it must be ends the sentence.
#[track_caller]
pub(super) fn assert_failed(
    answers: &[Option<Outcome>],
    index: usize,
    kind: PublishErrorKind,
    why: &str,
) {
    let answer = &answers[index];
    let failed = matches!(answer, Some(Outcome::Failed(found, _)) if *found == kind);
    assert!(failed, "message {index} must be answered {kind:?}, {why}; it is {}", in_words(answer));
}

pub(super) fn in_words(answer: &Option<Outcome>) -> String {
    match answer {
        None => "not answered, which counts as Unknown".to_owned(),
        Some(Outcome::Delivered(_)) => "answered as delivered".to_owned(),
        Some(Outcome::Failed(kind, failure)) => format!("answered {kind:?} ({failure})"),
        Some(other) => format!("answered {other:?}"),
    }
}

/// Asserts that what was added as `what` arrived byte for byte.
#[track_caller]
pub(super) fn assert_arrived(what: &str, added: Option<&[u8]>, arrived: Option<&[u8]>) {
    let (null, other) = match (added, arrived) {
        (Some(added), Some(arrived)) => {
            let same = added.iter().zip(arrived).take_while(|(a, b)| a == b).count();
            ("", format!("; the first {same} bytes are the same"))
        }
        (None, Some(_)) | (Some(_), None) => (" (null and empty are different)", String::new()),
        (None, None) => return,
    };
    assert!(
        added == arrived,
        "{what} was added as {} and arrived as {}{null}{other}",
        bytes(added),
        bytes(arrived)
    );
}

/// The only record of a topic.
#[track_caller]
pub(super) fn only(mut records: Vec<Published>) -> Published {
    assert_eq!(
        records.len(),
        1,
        "one message was published to this topic, once; `published_to` found {} records",
        list(&records)
    );
    records.remove(0)
}

/// Records, for reading: offset, key and payload.
pub(super) fn list(records: &[Published]) -> String {
    let one = |record: &Published| {
        let (key, payload) = (bytes(record.key.as_deref()), bytes(record.payload.as_deref()));
        format!("{}/{}: {key} {payload}", record.partition, record.offset)
    };
    let all: Vec<_> = records.iter().map(one).collect();
    format!("[{}]", all.join(", "))
}

fn bytes(bytes: Option<&[u8]>) -> String {
    const SHOWN: usize = 32;
    match bytes {
        None => "null".to_owned(),
        Some(bytes) if bytes.len() <= SHOWN => format!("\"{}\"", bytes.escape_ascii()),
        Some(bytes) => {
            format!("\"{}..\" ({} bytes)", bytes[..SHOWN].escape_ascii(), bytes.len())
        }
    }
}
