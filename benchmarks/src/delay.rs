//! A line to Kafka on which every byte takes its time, however many are on it.
//!
//! The tests' proxy holds one piece back while others wait behind it: that is a narrow line, not a
//! long one. This one stamps each piece when it comes, and passes it on when its time is over.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::Result;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, sleep_until},
};

/// Listens until it is dropped.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl Line {
    /// A line to that server on which an answer comes so much later.
    pub(crate) async fn to(server: SocketAddr, delay: Duration) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(server).await else { continue };
                let _ = (client.set_nodelay(true), server.set_nodelay(true));
                let ((from_client, to_client), (from_server, to_server)) =
                    (client.into_split(), server.into_split());
                tokio::spawn(carry(from_client, to_server, Duration::ZERO));
                tokio::spawn(carry(from_server, to_client, delay));
            }
        });
        Ok(Self { address, accepting })
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, delay: Duration) {
    let (pieces, mut arriving) = mpsc::channel::<(Instant, Vec<u8>)>(1_024);
    let reading = tokio::spawn(async move {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            if pieces.send((Instant::now() + delay, buffer[..read].to_vec())).await.is_err() {
                return;
            }
        }
    });
    while let Some((due, piece)) = arriving.recv().await {
        if !delay.is_zero() {
            sleep_until(due).await;
        }
        if to.write_all(&piece).await.is_err() {
            break;
        }
    }
    reading.abort();
}
