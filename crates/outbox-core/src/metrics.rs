//! An observer that exports the figures worth an alert through the `metrics` facade.

use std::collections::HashSet;

use crate::observe::{Event, Observer, Step};
use crate::store::StoreErrorKind;

/// Exports what a dispatcher does: add it with
/// [`DispatcherBuilder::observer`](crate::DispatcherBuilder::observer).
///
/// Alert on `outbox_oldest_pending_age_seconds` first, then on `outbox_held_messages` and
/// `outbox_dead_messages`. Topics that were not named appear as `other`, so that the number of
/// series stays bounded. Two dispatchers of one process share the gauges: give each a recorder, or a
/// process, of its own. Every figure with its unit and meaning is in `docs/running.md` of the
/// repository.
#[derive(Debug, Default)]
pub struct MetricsObserver {
    topics: HashSet<String>,
}

impl MetricsObserver {
    /// An observer whose topic label has these values, and `other`.
    pub fn new<T: Into<String>>(topics: impl IntoIterator<Item = T>) -> Self {
        Self { topics: topics.into_iter().map(Into::into).collect() }
    }

    fn label(&self, topic: &str) -> String {
        let named = self.topics.contains(topic);
        if named { topic.to_owned() } else { "other".to_owned() }
    }
}

impl Observer for MetricsObserver {
    fn observe(&self, event: &Event) {
        match event {
            Event::BacklogSampled { backlog } => {
                let age = backlog.oldest_age.unwrap_or_default().as_secs_f64();
                let counts = [backlog.pending, backlog.held, backlog.dead].map(|n| n as f64);
                for (figure, value) in BACKLOG.into_iter().zip([age].into_iter().chain(counts)) {
                    ::metrics::gauge!(figure).set(value);
                }
            }
            Event::Published { topic, latency, .. } => {
                let topic = self.label(topic);
                ::metrics::counter!("outbox_published_total", "topic" => topic.clone())
                    .increment(1);
                ::metrics::histogram!("outbox_delivery_latency_seconds", "topic" => topic)
                    .record(latency.as_secs_f64());
            }
            Event::PublishFailed { topic, kind, .. } => {
                let topic = self.label(topic);
                ::metrics::counter!(
                    "outbox_publish_failures_total", "topic" => topic, "kind" => kind.class()
                )
                .increment(1);
            }
            Event::Timed { step, took } => {
                let histogram = match step {
                    Step::Claim => ::metrics::histogram!("outbox_claim_seconds"),
                    Step::Publish => ::metrics::histogram!("outbox_publish_seconds"),
                    Step::Settle => ::metrics::histogram!("outbox_settle_seconds"),
                    _ => return,
                };
                histogram.record(took.as_secs_f64());
            }
            Event::Sampled { in_flight, content_bytes, lanes } => {
                ::metrics::gauge!("outbox_in_flight").set(*in_flight as f64);
                ::metrics::gauge!("outbox_content_bytes").set(*content_bytes as f64);
                ::metrics::gauge!("outbox_lanes").set(*lanes as f64);
                if *lanes == 0 {
                    no_backlog(); // Whoever has lanes counts.
                }
            }
            Event::StoreFailed { step, kind } => {
                ::metrics::counter!(
                    "outbox_store_failures_total", "step" => step.word(), "kind" => class(*kind)
                )
                .increment(1);
            }
            Event::BacklogUnknown => no_backlog(),
            Event::LanesLost { lanes } => {
                ::metrics::counter!("outbox_leases_lost_total").increment(lanes.len() as u64);
            }
            Event::CircuitOpened => ::metrics::gauge!("outbox_circuit_open").set(1.0),
            Event::CircuitClosed { .. } | Event::Stopped => {
                ::metrics::gauge!("outbox_circuit_open").set(0.0);
            }
            _ => {}
        }
    }
}

/// The figures of [`Event::BacklogSampled`].
const BACKLOG: [&str; 4] = [
    "outbox_oldest_pending_age_seconds",
    "outbox_pending",
    "outbox_held_messages",
    "outbox_dead_messages",
];

/// What was counted last would stay as it was, and no alert on it would come.
fn no_backlog() {
    for figure in BACKLOG {
        ::metrics::gauge!(figure).set(f64::NAN);
    }
}

fn class(kind: StoreErrorKind) -> &'static str {
    match kind {
        StoreErrorKind::Unavailable => "unavailable",
        StoreErrorKind::Conflict => "conflict",
        StoreErrorKind::Schema => "schema",
        StoreErrorKind::Unsupported => "unsupported",
        StoreErrorKind::NoTransaction => "no_transaction",
        StoreErrorKind::Invalid => "invalid",
        StoreErrorKind::Denied => "denied",
        StoreErrorKind::Other => "other",
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use metrics_util::debugging::DebuggingRecorder;

    use super::*;
    use crate::delivery::Receipt;
    use crate::message::MessageId;
    use crate::store::Backlog;

    #[test]
    fn every_figure_is_exported_and_unnamed_topics_are_other() {
        let recorder = DebuggingRecorder::new();
        let snapshotter = recorder.snapshotter();
        let observer = MetricsObserver::new(["orders"]);
        let published = |topic: &str| Event::Published {
            topic: topic.into(),
            id: MessageId::generate(),
            latency: Duration::from_millis(3),
            receipt: Receipt::default(),
        };
        ::metrics::with_local_recorder(&recorder, || {
            let backlog = Backlog::new(7, Some(Duration::from_secs(9)), 1, 2);
            observer.observe(&Event::BacklogSampled { backlog });
            observer.observe(&published("orders"));
            observer.observe(&published("unnamed"));
            observer.observe(&Event::Sampled { in_flight: 3, content_bytes: 70, lanes: 16 });
            observer.observe(&Event::CircuitOpened);
        });
        let seen: Vec<String> = snapshotter
            .snapshot()
            .into_vec()
            .into_iter()
            .map(|(key, _, _, value)| {
                let labels: Vec<&str> = key.key().labels().map(|label| label.value()).collect();
                format!("{} {labels:?} {value:?}", key.key().name())
            })
            .collect();
        for expected in [
            "outbox_oldest_pending_age_seconds [] Gauge(9.0)",
            "outbox_pending [] Gauge(7.0)",
            "outbox_held_messages [] Gauge(1.0)",
            "outbox_dead_messages [] Gauge(2.0)",
            "outbox_published_total [\"orders\"] Counter(1)",
            "outbox_published_total [\"other\"] Counter(1)",
            "outbox_content_bytes [] Gauge(70.0)",
            "outbox_in_flight [] Gauge(3.0)",
            "outbox_lanes [] Gauge(16.0)",
            "outbox_circuit_open [] Gauge(1.0)",
        ] {
            assert!(seen.iter().any(|line| line == expected), "{expected} is not in {seen:#?}");
        }
    }
}
