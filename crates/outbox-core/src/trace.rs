//! W3C trace context, carried from the caller to the consumer byte for byte.

use crate::message::{Headers, MessageError, header};

/// The caller's trace context as header values.
///
/// The values are carried byte for byte. Any tracing library can fill it: with OpenTelemetry,
/// inject the current context into a map and take the three entries.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TraceContext {
    traceparent: Option<String>,
    tracestate: Option<String>,
    baggage: Option<String>,
}

impl TraceContext {
    /// A context with this `traceparent`.
    pub fn new(traceparent: impl Into<String>) -> Self {
        Self { traceparent: Some(traceparent.into()), ..Self::default() }
    }

    /// Sets `tracestate`.
    #[must_use]
    pub fn with_tracestate(mut self, tracestate: impl Into<String>) -> Self {
        self.tracestate = Some(tracestate.into());
        self
    }

    /// Sets `baggage`.
    #[must_use]
    pub fn with_baggage(mut self, baggage: impl Into<String>) -> Self {
        self.baggage = Some(baggage.into());
        self
    }

    /// Writes the context into headers, unless they already carry one.
    pub(crate) fn stamp(&self, headers: &mut Headers) -> Result<(), MessageError> {
        if headers.contains(header::TRACEPARENT) {
            return Ok(());
        }
        let values = [
            (header::TRACEPARENT, &self.traceparent),
            (header::TRACESTATE, &self.tracestate),
            (header::BAGGAGE, &self.baggage),
        ];
        for (name, value) in values {
            if let Some(value) = value {
                headers.insert_if_absent(name, value.as_bytes())?;
            }
        }
        Ok(())
    }
}
