//! What a test needs of HTTP.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::PATIENCE;

#[derive(Debug)]
pub(super) struct Answer {
    pub(super) code: u16,
    pub(super) body: String,
}

impl Answer {
    pub(super) fn json(&self) -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&self.body)?)
    }
}

pub(super) async fn get(address: &str, path: &str) -> Result<Answer> {
    send(address, "GET", path, "").await
}

pub(super) async fn post(address: &str, path: &str, body: &str) -> Result<Answer> {
    send(address, "POST", path, body).await
}

/// One request on a connection of its own, which the server closes behind its answer.
async fn send(address: &str, method: &str, path: &str, body: &str) -> Result<Answer> {
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        anyhow::Ok(answer)
    };
    let answer = timeout(PATIENCE, answer).await.context("no answer")??;
    let (head, body) = answer.split_once("\r\n\r\n").context("no whole answer")?;
    let code = head.split(' ').nth(1).context("no status")?.parse()?;
    Ok(Answer { code, body: body.to_owned() })
}

/// Asks until the answer is as wanted, and gives it.
pub(super) async fn get_until(
    address: &str,
    path: &str,
    is_wanted: impl Fn(&Answer) -> bool,
) -> Result<Answer> {
    let start = Instant::now();
    loop {
        let answer = get(address, path).await?;
        if is_wanted(&answer) {
            return Ok(answer);
        }
        ensure!(start.elapsed() < PATIENCE, "{path} still answers {answer:?}");
        sleep(Duration::from_millis(100)).await;
    }
}
