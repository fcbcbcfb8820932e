//! The service's face: orders, and its health.

use std::time::Duration;

use anyhow::Result;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use outbox_core::DispatcherHandle;
use outbox_core::status::Health;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::sleep;

use crate::part::Stopped;
use crate::repository::{NewOrder, Order, OrderError, Orders};

/// How long requests that are being answered may take once the service stops.
const FAREWELL: Duration = Duration::from_secs(5);

#[derive(Clone)]
struct Shop {
    orders: Orders,
    relay: DispatcherHandle,
}

pub fn router(orders: Orders, relay: DispatcherHandle) -> Router {
    Router::new()
        .route("/orders", post(place))
        .route("/orders/{id}", get(find))
        .route("/orders/{id}/cancel", post(cancel))
        .route("/health", get(health))
        .with_state(Shop { orders, relay })
}

/// Serves until `stopped`: then no connection is taken any more, and requests that have arrived are
/// answered.
pub async fn serve(listener: TcpListener, router: Router, stopped: Stopped) -> Result<()> {
    let (closing, closed) = oneshot::channel::<()>();
    let serving = axum::serve(listener, router).with_graceful_shutdown(async move {
        stopped.await;
        drop(closing);
    });
    tokio::select! {
        served = serving.into_future() => served?,
        // A client that keeps its connection open must not hold up the end.
        () = async { _ = closed.await; sleep(FAREWELL).await } => {}
    }
    Ok(())
}

async fn place(
    State(shop): State<Shop>,
    Json(order): Json<NewOrder>,
) -> Result<(StatusCode, Json<Value>), OrderError> {
    let id = to_its_end(async move { shop.orders.place(order).await }).await?;
    Ok((StatusCode::CREATED, Json(json!({ "id": id }))))
}

async fn cancel(State(shop): State<Shop>, Path(id): Path<u64>) -> Result<StatusCode, OrderError> {
    to_its_end(async move { shop.orders.cancel(id).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn find(State(shop): State<Shop>, Path(id): Path<u64>) -> Result<Json<Order>, OrderError> {
    Ok(Json(shop.orders.find(id).await?))
}

/// axum drops a handler whose client has gone. A transaction should not end in the middle of a
/// statement for that, so it has a task of its own.
async fn to_its_end<T: Send + 'static>(
    change: impl Future<Output = Result<T, OrderError>> + Send + 'static,
) -> Result<T, OrderError> {
    tokio::spawn(change).await?
}

/// 503 takes this instance out of the load balancer, so it is for what keeps orders from being
/// taken: a database that is gone, a relay that has ended. While Kafka is down orders are taken:
/// that is what the outbox is for. The body tells it, for people and alerts.
async fn health(State(shop): State<Shop>) -> (StatusCode, Json<Value>) {
    let status = shop.relay.status();
    let unfit = matches!(
        status.health,
        Health::Starting | Health::StoreDown { .. } | Health::Draining | Health::Stopped
    );
    let code = if unfit { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    let body = json!({
        "relay": status.health.to_string(),
        "delivers": status.health.is_ready(),
        "pending": status.backlog.map(|backlog| backlog.pending),
        "oldest_pending_age_seconds":
            status.backlog.and_then(|backlog| backlog.oldest_age).map(|age| age.as_secs_f64()),
        "held_keys": status.held_keys,
        "detail": status.detail,
    });
    (code, Json(body))
}

impl IntoResponse for OrderError {
    fn into_response(self) -> Response {
        let code = match self {
            Self::Customer => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Unknown => StatusCode::NOT_FOUND,
            Self::Cancelled => StatusCode::CONFLICT,
            // What went wrong inside is for the log, not for the client.
            Self::Database(_) | Self::Message(_) | Self::Add(_) | Self::Interrupted(_) => {
                tracing::error!(error = &self as &dyn std::error::Error, "an order failed");
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        (code, Json(json!({ "error": self.to_string() }))).into_response()
    }
}
