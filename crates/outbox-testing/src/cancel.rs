//! Cancellation: a future that is dropped where it waits.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

/// The output of `future`, if it gives it within `polls` polls; otherwise it is dropped where it
/// waits.
///
/// Called with 1, 2, 3 and so on until it is `Some`, it drops a future at each of its await points:
/// whoever is cancelled in a `select!` or by a timeout is dropped at one of them.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use outbox_testing::drop_after;
///
/// let waits_once = async || tokio::task::yield_now().await;
/// assert_eq!(drop_after(1, waits_once()).await, None);
/// assert_eq!(drop_after(2, waits_once()).await, Some(()));
/// # }
/// ```
pub async fn drop_after<F: Future>(polls: usize, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = polls;
    poll_fn(move |context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            // The last one: nobody will wake us for what is dropped.
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}
