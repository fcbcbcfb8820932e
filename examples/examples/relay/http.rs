//! What the relay tells of itself: `/health` for probes and people, `/metrics` for Prometheus.

use axum::http::{StatusCode, header::CONTENT_TYPE};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use outbox_core::DispatcherHandle;
use outbox_core::status::Status;
use serde_json::{Value, json};

pub fn router(relay: DispatcherHandle, figures: PrometheusHandle) -> Router {
    Router::new()
        .route("/health", get(async move || health(&relay.status())))
        .route("/metrics", get(async move || metrics(&figures)))
}

fn health(status: &Status) -> (StatusCode, Json<Value>) {
    let code = match status.health.is_ready() {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    let age = status.backlog.and_then(|backlog| backlog.oldest_age);
    let body = json!({
        "health": status.health.to_string(),
        "detail": status.detail,
        "warnings": status.warnings,
        "closed_topics": status.closed_topics.iter().map(|topic| &**topic).collect::<Vec<_>>(),
        "lanes": status.lanes,
        "in_flight": status.in_flight,
        "pending": status.backlog.map(|backlog| backlog.pending),
        "oldest_pending_age_seconds": age.map(|age| age.as_secs_f64()),
    });
    (code, Json(body))
}

fn metrics(figures: &PrometheusHandle) -> impl IntoResponse + use<> {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], figures.render())
}
