//! Forbids and allows topics, on a cluster with an authorizer. librdkafka has no call for it that
//! its Rust side offers, so the request is written here.

use anyhow::{Context, Result, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::Kafka;

/// Settings of nodes that ask Kafka's own authorizer, which allows whatever no rule is about.
pub const AUTHORIZER: &[(&str, &str)] = &[
    ("authorizer.class.name", "org.apache.kafka.metadata.authorizer.StandardAuthorizer"),
    ("allow.everyone.if.no.acl.found", "true"),
];

const CREATE: i16 = 30;
const DELETE: i16 = 31;

impl Kafka {
    /// Lets nobody write to that topic.
    ///
    /// # Errors
    ///
    /// When the cluster refuses, as one without an authorizer does.
    pub async fn forbid_writing(&self, topic: &str) -> Result<()> {
        self.change_acl(CREATE, topic).await
    }

    /// Takes [`forbid_writing`](Self::forbid_writing) back.
    ///
    /// # Errors
    ///
    /// When the cluster refuses.
    pub async fn allow_writing(&self, topic: &str) -> Result<()> {
        self.change_acl(DELETE, topic).await
    }

    async fn change_acl(&self, api: i16, topic: &str) -> Result<()> {
        let broker = self.bootstrap.split(',').next().context("a broker")?;
        let mut stream = TcpStream::connect(broker).await?;
        let request = request(api, topic)?;
        stream.write_i32(request.len().try_into()?).await?;
        stream.write_all(&request).await?;
        let mut answer = vec![0; stream.read_i32().await?.try_into()?];
        stream.read_exact(&mut answer).await?;
        // Correlation id, throttle time, the count of results, and the first one's error code.
        let code = answer.get(12..14).context("the answer is too short")?;
        let code = i16::from_be_bytes(code.try_into()?);
        ensure!(code == 0, "Kafka's error {code}");
        Ok(())
    }
}

/// Version 1 of either request, with one rule: nobody, from nowhere, may write to this topic.
fn request(api: i16, topic: &str) -> Result<Vec<u8>> {
    const VERSION: i16 = 1;
    const TOPIC: u8 = 2;
    const LITERAL: u8 = 3;
    const WRITE: u8 = 4;
    const DENY: u8 = 2;
    let mut bytes = vec![];
    bytes.extend(api.to_be_bytes());
    bytes.extend(VERSION.to_be_bytes());
    bytes.extend(7_i32.to_be_bytes());
    string(&mut bytes, "tests")?;
    bytes.extend(1_i32.to_be_bytes());
    bytes.push(TOPIC);
    string(&mut bytes, topic)?;
    bytes.push(LITERAL);
    string(&mut bytes, "User:*")?;
    string(&mut bytes, "*")?;
    bytes.extend([WRITE, DENY]);
    Ok(bytes)
}

fn string(bytes: &mut Vec<u8>, text: &str) -> Result<()> {
    bytes.extend(i16::try_from(text.len())?.to_be_bytes());
    bytes.extend(text.as_bytes());
    Ok(())
}
