//! What a test expects of messages, and assertions that show what was there instead.

use std::fmt::{self, Write as _};

use outbox_core::Message;

use crate::Published;

/// What a test expects of one message; what is not said is not compared.
///
/// A topic, or a topic and a key, convert by themselves: `"orders"`, `("orders", "7")`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct Expected {
    topic: String,
    key: Option<Option<Vec<u8>>>,
    payload: Option<Option<Vec<u8>>>,
    headers: Vec<(String, Vec<u8>)>,
}

impl Expected {
    /// A message for this topic.
    pub fn topic(topic: impl Into<String>) -> Self {
        Self { topic: topic.into(), key: None, payload: None, headers: Vec::new() }
    }

    /// It has this key.
    pub fn key(mut self, key: impl Into<Vec<u8>>) -> Self {
        self.key = Some(Some(key.into()));
        self
    }

    /// It has no key.
    pub fn no_key(mut self) -> Self {
        self.key = Some(None);
        self
    }

    /// It has this payload.
    pub fn payload(mut self, payload: impl Into<Vec<u8>>) -> Self {
        self.payload = Some(Some(payload.into()));
        self
    }

    /// It is a tombstone.
    pub fn tombstone(mut self) -> Self {
        self.payload = Some(None);
        self
    }

    /// It has this header, among others.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    fn matches(&self, found: &Found<'_>) -> bool {
        let has = |(name, value): &(String, Vec<u8>)| {
            found.headers.iter().any(|(n, v)| n == name && *v == Some(value.as_slice()))
        };
        self.topic == found.topic
            && self.key.as_ref().is_none_or(|key| key.as_deref() == found.key)
            && self.payload.as_ref().is_none_or(|payload| payload.as_deref() == found.payload)
            && self.headers.iter().all(has)
    }
}

impl From<&str> for Expected {
    fn from(topic: &str) -> Self {
        Self::topic(topic)
    }
}

impl From<(&str, &str)> for Expected {
    fn from((topic, key): (&str, &str)) -> Self {
        Self::topic(topic).key(key)
    }
}

/// Asserts that `found` are exactly the expected messages, in this order. `place` names where
/// they were looked for, such as `"returned by place_order"`.
///
/// # Panics
///
/// When they are not; the text shows what was there instead.
#[track_caller]
pub fn assert_messages<'m, M, E>(
    place: &str,
    found: impl IntoIterator<Item = &'m M>,
    expected: impl IntoIterator<Item = E>,
) where
    M: 'm,
    Found<'m>: From<&'m M>,
    E: Into<Expected>,
{
    let found: Vec<Found<'m>> = found.into_iter().map(Found::from).collect();
    let expected: Vec<Expected> = expected.into_iter().map(Into::into).collect();
    let same = found.len() == expected.len()
        && expected.iter().zip(&found).all(|(expected, found)| expected.matches(found));
    if !same {
        panic!("{}", difference(place, &found, &expected));
    }
}

fn difference(place: &str, found: &[Found<'_>], expected: &[Expected]) -> String {
    let mut text = format!("{} messages {place}, {} expected\n", found.len(), expected.len());
    for index in 0..found.len().max(expected.len()) {
        let (found, expected) = (found.get(index), expected.get(index));
        let as_expected = found.zip(expected).is_some_and(|(found, e)| e.matches(found));
        // Writing to a `String` cannot fail.
        _ = match (as_expected, found) {
            (true, Some(found)) => writeln!(text, "    {index}: {found}"),
            (_, Some(found)) => writeln!(text, "  ! {index}: {found}"),
            (_, None) => writeln!(text, "  ! {index}: nothing"),
        };
        if !as_expected {
            _ = match expected {
                Some(expected) => writeln!(text, "       expected {expected}"),
                None => writeln!(text, "       expected nothing"),
            };
        }
    }
    text
}

/// What assertions compare of a message, wherever it was found.
#[derive(Debug, Clone)]
pub struct Found<'m> {
    topic: &'m str,
    key: Option<&'m [u8]>,
    payload: Option<&'m [u8]>,
    headers: Vec<(&'m str, Option<&'m [u8]>)>,
}

impl<'m> From<&'m Message> for Found<'m> {
    fn from(message: &'m Message) -> Self {
        Self {
            topic: message.topic(),
            key: message.key(),
            payload: message.payload(),
            headers: message.headers().iter().collect(),
        }
    }
}

impl<'m> From<&'m Published> for Found<'m> {
    fn from(record: &'m Published) -> Self {
        let headers = record.headers.iter();
        Self {
            topic: &record.topic,
            key: record.key.as_deref(),
            payload: record.payload.as_deref(),
            headers: headers.map(|(name, value)| (name.as_str(), value.as_deref())).collect(),
        }
    }
}

impl fmt::Display for Found<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} key {} payload {}", self.topic, Text(self.key), Text(self.payload))?;
        for (name, value) in &self.headers {
            write!(f, ", {name}: {}", Text(*value))?;
        }
        Ok(())
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.topic)?;
        if let Some(key) = &self.key {
            write!(f, " key {}", Text(key.as_deref()))?;
        }
        if let Some(payload) = &self.payload {
            write!(f, " payload {}", Text(payload.as_deref()))?;
        }
        for (name, value) in &self.headers {
            write!(f, ", {name}: {}", Text(Some(value)))?;
        }
        Ok(())
    }
}

/// Bytes on one line, cut where they get long.
struct Text<'b>(Option<&'b [u8]>);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 120;
        match self.0 {
            None => f.write_str("none"),
            Some(bytes) if bytes.len() > SHOWN => {
                write!(f, "\"{}..\" ({} bytes)", bytes[..SHOWN].escape_ascii(), bytes.len())
            }
            Some(bytes) => write!(f, "\"{}\"", bytes.escape_ascii()),
        }
    }
}
