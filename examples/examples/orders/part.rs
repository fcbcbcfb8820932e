//! A part of the service: it runs until it is told to stop, and tells when it ended by itself.

use std::pin::Pin;
use std::sync::Arc;

use anyhow::Result;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;

/// Resolves when the part is to stop.
pub type Stopped = Pin<Box<dyn Future<Output = ()> + Send>>;

pub struct Part {
    stop: oneshot::Sender<()>,
    running: JoinHandle<Result<()>>,
}

impl Part {
    /// Starts a part, which rings `ended` at its end, be that a panic.
    pub fn start<F>(ended: &Arc<Notify>, run: impl FnOnce(Stopped) -> F) -> Self
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let (stop, stopped) = oneshot::channel();
        let running = run(Box::pin(async move {
            _ = stopped.await;
        }));
        let bell = Bell(Arc::clone(ended));
        let running = tokio::spawn(async move {
            let _bell = bell;
            running.await
        });
        Self { stop, running }
    }

    /// Tells it to stop, and waits until it has.
    pub async fn stop(self) -> Result<()> {
        _ = self.stop.send(());
        self.running.await?
    }
}

struct Bell(Arc<Notify>);

impl Drop for Bell {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}
