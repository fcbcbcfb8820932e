//! Ordered, repeatable headers.

use std::fmt;

use super::{MessageError, MessageErrorKind};

/// Names of headers that have a meaning here.
pub mod header {
    /// The message id, set at publish; the same in every appearance.
    pub const ID: &str = "outbox-id";
    /// Set to `true` at publish on a dead letter that was retried out of its place.
    pub const RETRIED: &str = "outbox-retried";
    /// Media type of the payload.
    pub const CONTENT_TYPE: &str = "content-type";
    /// W3C Trace Context: the caller's span.
    pub const TRACEPARENT: &str = "traceparent";
    /// W3C Trace Context: vendor state.
    pub const TRACESTATE: &str = "tracestate";
    /// W3C Baggage.
    pub const BAGGAGE: &str = "baggage";
    /// Names that begin with this are ours; a user's header of such a name is refused.
    pub const RESERVED_PREFIX: &str = "outbox-";
}

/// Headers of a message: ordered, repeatable, values of any bytes or null.
///
/// Names are 1 to 128 visible ASCII characters and do not begin with `outbox-`. `Debug` prints
/// names and sizes, never values.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, Option<Vec<u8>>)>);

impl Headers {
    /// All headers in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Option<&[u8]>)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_deref()))
    }

    /// The value of the first header of this name; `None` when absent or null.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.iter().find(|(other, _)| *other == name).and_then(|(_, value)| value)
    }

    /// Whether a header of this name is present.
    pub fn contains(&self, name: &str) -> bool {
        self.iter().any(|(other, _)| other == name)
    }

    /// How many headers there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no headers.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes of all names and values.
    pub fn size(&self) -> usize {
        self.iter().map(|(name, value)| name.len() + value.map_or(0, <[u8]>::len)).sum()
    }

    /// Appends a header; `None` is a null value.
    ///
    /// # Errors
    ///
    /// [`MessageErrorKind::Header`] when the name is malformed or reserved.
    pub fn append(
        &mut self,
        name: impl Into<String>,
        value: Option<Vec<u8>>,
    ) -> Result<(), MessageError> {
        let name = name.into();
        check_name(&name)?;
        self.0.push((name, value));
        Ok(())
    }

    /// Appends a header unless one of this name exists.
    ///
    /// # Errors
    ///
    /// [`MessageErrorKind::Header`] when the name is malformed or reserved.
    pub fn insert_if_absent(
        &mut self,
        name: &str,
        value: impl Into<Vec<u8>>,
    ) -> Result<(), MessageError> {
        if self.contains(name) { Ok(()) } else { self.append(name, Some(value.into())) }
    }
}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.iter().map(|(name, value)| (name, value.map(<[u8]>::len))))
            .finish()
    }
}

fn check_name(name: &str) -> Result<(), MessageError> {
    let valid = (1..=128).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_graphic())
        && !name.starts_with(header::RESERVED_PREFIX);
    if valid { Ok(()) } else { Err(MessageErrorKind::Header.into()) }
}
