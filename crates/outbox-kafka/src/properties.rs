//! Which librdkafka properties a user may set, and which would break a promise.

use crate::error::{KafkaBuildError, KafkaBuildErrorKind};

/// What a user may do with a property; what is not listed is passed on.
enum Rule {
    /// Has a method of its own.
    Method(&'static str),
    /// Never, for this reason.
    Never(&'static str),
    /// Only with one of these values, which is what we set anyway; the reason.
    Only(&'static [&'static str], &'static str),
    /// Only numbers of at least this; the reason.
    AtLeast(u64, &'static str),
    /// Only numbers from 1 to this; the reason.
    AtMost(u64, &'static str),
}

use Rule::{AtLeast, AtMost, Method, Never, Only};

const TRUE: &[&str] = &["true", "t", "1"];
const FALSE: &[&str] = &["false", "f", "0"];

const RETRIES: &str = "without retries every broken connection fails messages";
const UNDECIDED: &str = "it is part of the longest time a message can stay undecided";
const VERIFY: &str = "an unverified broker can be anyone";
const CALLBACKS: &str = "callbacks belong to the broker";
const CODE: &str = "foreign code in the client can change what is sent and acknowledged";
const GAPLESS: &str = "it turns one failed message into a fatal error of the producer";
const QUEUE: &str = "the dispatcher's window would not fit into the queue";
const ORDER: &str = "more requests in flight reorder messages after a retry";

const RULES: &[(&str, Rule)] = &[
    ("bootstrap.servers", Method("KafkaBroker::builder")),
    ("metadata.broker.list", Method("KafkaBroker::builder")),
    ("client.id", Method("client_id")),
    ("message.timeout.ms", Method("message_timeout")),
    ("delivery.timeout.ms", Method("message_timeout")),
    ("message.max.bytes", Method("max_message_bytes")),
    ("linger.ms", Method("linger")),
    ("queue.buffering.max.ms", Method("linger")),
    ("compression.type", Method("compression")),
    ("compression.codec", Method("compression")),
    ("partitioner", Method("partitioner")),
    ("enable.idempotence", Only(TRUE, "retries would duplicate and reorder messages")),
    ("acks", Only(&["all", "-1"], "an acknowledged message could be lost")),
    ("request.required.acks", Only(&["all", "-1"], "an acknowledged message could be lost")),
    ("allow.auto.create.topics", Only(FALSE, "a misspelt topic would come into being")),
    ("delivery.report.only.error", Only(FALSE, "acknowledged messages would stay undecided")),
    ("queuing.strategy", Only(&["fifo"], "messages would be sent out of order")),
    ("enable.gapless.guarantee", Only(FALSE, GAPLESS)),
    ("max.in.flight.requests.per.connection", AtMost(5, ORDER)),
    ("max.in.flight", AtMost(5, ORDER)),
    ("retries", AtLeast(1, RETRIES)),
    ("message.send.max.retries", AtLeast(1, RETRIES)),
    ("queue.buffering.max.messages", AtLeast(super::builder::MIN_QUEUE_MESSAGES, QUEUE)),
    ("queue.buffering.max.kbytes", AtLeast(super::builder::MIN_QUEUE_KBYTES, QUEUE)),
    ("reconnect.backoff.ms", Never(UNDECIDED)),
    ("reconnect.backoff.max.ms", Never(UNDECIDED)),
    ("transactional.id", Never("transactions are not supported yet")),
    ("transaction.timeout.ms", Never("transactions are not supported yet")),
    ("enable.ssl.certificate.verification", Only(TRUE, VERIFY)),
    ("ssl.endpoint.identification.algorithm", Only(&["https"], VERIFY)),
    ("plugin.library.paths", Never(CODE)),
    ("ssl.engine.location", Never(CODE)),
    ("ssl.providers", Never(CODE)),
    ("interceptors", Never(CODE)),
    ("opaque", Never(CALLBACKS)),
    ("enabled_events", Never(CALLBACKS)),
    ("log.queue", Never(CALLBACKS)),
    ("internal.termination.signal", Never(CALLBACKS)),
];

/// Whether a user may set `key` to `value`; `Ok(false)` when it is what we set anyway.
pub(crate) fn check(key: &str, value: &str) -> Result<bool, KafkaBuildError> {
    use KafkaBuildErrorKind::{Invalid, Refused, Reserved};
    let error = |kind, reason: &str| Err(KafkaBuildError::of_key(kind, key, reason));
    if key.ends_with("_cb") {
        return error(Refused, CALLBACKS);
    }
    if key.starts_with("test.") {
        return error(Refused, "messages would go to a simulated cluster and be lost");
    }
    let Some((_, rule)) = RULES.iter().find(|(name, _)| *name == key) else { return Ok(true) };
    match rule {
        Method(name) => error(Reserved, &format!("use `{name}`")),
        Never(why) => error(Refused, why),
        Only(values, why) => {
            let same = values.iter().any(|allowed| allowed.eq_ignore_ascii_case(value.trim()));
            if same { Ok(false) } else { error(Refused, why) }
        }
        AtLeast(..) | AtMost(..) => match (rule, value.trim().parse::<u64>()) {
            (_, Err(_)) => error(Invalid, "not a number"),
            (AtLeast(least, why), Ok(number)) if number < *least => error(Refused, why),
            (AtMost(most, why), Ok(number)) if !(1..=*most).contains(&number) => {
                error(Refused, why)
            }
            _ => Ok(true),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_that_would_break_a_promise_are_refused() {
        let refused = [
            ("enable.idempotence", "false"),
            ("acks", "1"),
            ("acks", "0"),
            ("request.required.acks", "1"),
            ("max.in.flight", "6"),
            ("max.in.flight.requests.per.connection", "1000000"),
            ("max.in.flight", "0"),
            ("allow.auto.create.topics", "true"),
            ("enable.gapless.guarantee", "true"),
            ("transactional.id", "relay"),
            ("retries", "0"),
            ("message.send.max.retries", "0"),
            ("queue.buffering.max.messages", "10"),
            ("queue.buffering.max.kbytes", "1"),
            ("delivery.report.only.error", "true"),
            ("queuing.strategy", "lifo"),
            ("reconnect.backoff.max.ms", "10000"),
            ("dr_msg_cb", "x"),
            ("dr_cb", "x"),
            ("plugin.library.paths", "x"),
            ("ssl.engine.location", "x"),
            ("ssl.providers", "x"),
            ("test.mock.num.brokers", "3"),
            ("enable.ssl.certificate.verification", "false"),
            ("ssl.endpoint.identification.algorithm", "none"),
        ];
        for (key, value) in refused {
            let error = check(key, value).unwrap_err();
            assert_eq!(error.kind(), KafkaBuildErrorKind::Refused, "{key}={value}");
            assert_eq!(error.key(), Some(key));
        }
    }

    #[test]
    fn properties_with_a_method_of_their_own_are_reserved() {
        for key in ["message.timeout.ms", "partitioner", "linger.ms", "bootstrap.servers"] {
            let error = check(key, "1").unwrap_err();
            assert_eq!(error.kind(), KafkaBuildErrorKind::Reserved, "{key}");
        }
    }

    #[test]
    fn harmless_properties_pass_and_repetitions_of_ours_are_dropped() {
        assert!(check("socket.keepalive.enable", "true").unwrap());
        assert!(check("max.in.flight", "1").unwrap());
        assert!(check("retries", "10").unwrap());
        assert!(!check("acks", "ALL").unwrap());
        assert!(!check("enable.idempotence", "true").unwrap());
    }

    #[test]
    fn a_limit_that_is_not_a_number_is_invalid() {
        let error = check("max.in.flight", "-1").unwrap_err();
        assert_eq!(error.kind(), KafkaBuildErrorKind::Invalid);
    }
}
