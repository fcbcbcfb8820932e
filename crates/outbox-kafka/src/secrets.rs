//! Which property values may be printed, and how the others are kept out of text.

use std::borrow::Cow;

/// Stands for a value that is not printed.
pub(crate) const REDACTED: &str = "[redacted]";

/// The only keys whose values are printed. An allow-list: a property of a later librdkafka is
/// redacted until someone has looked at it.
const PRINTABLE: &[&str] = &[
    "acks",
    "allow.auto.create.topics",
    "batch.num.messages",
    "batch.size",
    "bootstrap.servers",
    "client.id",
    "compression.type",
    "enable.idempotence",
    "linger.ms",
    "max.in.flight.requests.per.connection",
    "message.max.bytes",
    "message.timeout.ms",
    "partitioner",
    "queue.buffering.max.kbytes",
    "queue.buffering.max.messages",
    "reconnect.backoff.max.ms",
    "reconnect.backoff.ms",
    "sasl.mechanism",
    "security.protocol",
    "topic.metadata.propagation.max.ms",
];

/// The value of `key` as it may be printed.
pub(crate) fn printable<'a>(key: &str, value: &'a str) -> &'a str {
    if PRINTABLE.contains(&key) { value } else { REDACTED }
}

/// Values that must never appear in a log line or an error text.
#[derive(Default)]
pub(crate) struct Secrets(Vec<String>);

impl Secrets {
    /// The values of all properties that are not printable, but for those that hide nothing: without
    /// every 0 and every "true" a log cannot be read.
    pub(crate) fn of<'a>(properties: impl Iterator<Item = (&'a str, &'a str)>) -> Self {
        let hides = |value: &str| value.len() > 2 && !matches!(value, "true" | "false");
        let secret =
            |&(key, value): &(&str, &str)| hides(value) && printable(key, value) == REDACTED;
        let mut values: Vec<_> = properties.filter(secret).map(|(_, v)| v.to_owned()).collect();
        // The longest first, so that a value that contains another one is covered whole.
        values.sort_by_key(|value| std::cmp::Reverse(value.len()));
        Self(values)
    }

    /// `text` without any of the values.
    pub(crate) fn scrub<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut clean = Cow::Borrowed(text);
        for value in &self.0 {
            if clean.contains(value) {
                clean = Cow::Owned(clean.replace(value, REDACTED));
            }
        }
        clean
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_that_nobody_looked_at_is_redacted() {
        assert_eq!(printable("sasl.password", "s3cret"), REDACTED);
        assert_eq!(printable("a.future.property", "s3cret"), REDACTED);
        assert_eq!(printable("client.id", "orders"), "orders");
    }

    #[test]
    fn text_is_scrubbed_of_every_secret_value() {
        let properties = [("sasl.password", "abc"), ("ssl.key.pem", "abcdef"), ("client.id", "x")];
        let secrets = Secrets::of(properties.into_iter());
        assert_eq!(secrets.scrub("x: abcdef, abc"), "x: [redacted], [redacted]");
    }

    #[test]
    fn values_that_hide_nothing_leave_a_log_readable() {
        let secrets =
            Secrets::of([("retries", "0"), ("socket.keepalive.enable", "true")].into_iter());
        assert_eq!(secrets.scrub("true of 127.0.0.1:9092"), "true of 127.0.0.1:9092");
    }

    proptest! {
        #[test]
        fn no_secret_value_survives_scrubbing(
            values in vec("[a-z0-9]{6,12}", 1..5),
            pieces in vec((0_usize..5, "\\PC{0,6}"), 0..12),
        ) {
            // The mark itself is no secret.
            prop_assume!(values.iter().all(|value| !REDACTED.contains(value.as_str())));
            let pairs = values.iter().map(|value| ("sasl.password", value.as_str()));
            let secrets = Secrets::of(pairs);
            let mut text = String::new();
            for (which, filler) in &pieces {
                text += &values[which % values.len()];
                text += filler;
            }
            let clean = secrets.scrub(&text).into_owned();
            for value in &values {
                prop_assert!(!clean.contains(value.as_str()), "{}: {}", value, clean);
            }
        }
    }
}
