//! Moves bytes, as the faults say.

use std::{io, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::Notify,
    time,
};

use super::{Direction, Shared, faults::Verdict};

/// The server has answered in full when nothing came for this long: an answer to several statements
/// comes in pieces, and a connection closed too early could stop the server between them.
const QUIET: Duration = Duration::from_millis(100);

pub(super) async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => drop(tokio::spawn(carry(client, Arc::clone(&shared)))),
            // Out of file descriptors, perhaps: others are freed meanwhile.
            Err(_) => time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Serves one connection until both sides end it, or it is cut.
async fn carry(mut client: TcpStream, shared: Arc<Shared>) -> io::Result<()> {
    let mut cuts = shared.cuts.subscribe();
    let address = shared.faults().server;
    let connected = tokio::select! {
        server = TcpStream::connect(address) => server,
        _ = cuts.changed() => Err(cut()),
    };
    let mut server = match connected {
        Ok(server) => server,
        // A client that reached a proxy without a server sees its connection reset.
        Err(_) => return client.set_zero_linger(),
    };
    // The proxy adds only the delays it was told to.
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let link = Link { shared: &shared, drop_reply: Notify::new() };
    let ended = tokio::select! {
        both = async {
            tokio::try_join!(
                link.pump(Direction::ToServer, from_client, to_server),
                link.pump(Direction::ToClient, from_server, to_client),
            )
        } => both.map(|_| ()),
        _ = cuts.changed() => Err(cut()),
    };
    if ended.is_err() {
        // Closed by a reset, not in order.
        client.set_zero_linger()?;
        server.set_zero_linger()?;
    }
    Ok(())
}

struct Link<'a> {
    shared: &'a Shared,
    /// Tells the other direction that nothing may reach the client any more.
    drop_reply: Notify,
}

impl Link<'_> {
    /// Ends in order when the sender does, and by an error, which ends both directions, when cut.
    async fn pump(
        &self,
        direction: Direction,
        mut from: ReadHalf<'_>,
        mut to: WriteHalf<'_>,
    ) -> io::Result<()> {
        let mut buffer = vec![0; 64 * 1024];
        let mut tail = vec![];
        let mut silent = false;
        loop {
            let read = tokio::select! {
                biased;
                () = self.drop_reply.notified(), if direction == Direction::ToClient => {
                    return drop_reply(from).await;
                }
                read = from.read(&mut buffer) => read?,
            };
            if read == 0 {
                // Half closed; the other half may go on.
                return to.shutdown().await;
            }
            let piece = &buffer[..read];
            if silent {
                continue;
            }
            let verdict = self.shared.faults().judge(direction, piece, &mut tail);
            let delay = self.shared.faults().draw_delay(direction);
            if let Some(delay) = delay {
                time::sleep(delay).await;
            }
            match verdict {
                Verdict::Forward => to.write_all(piece).await?,
                Verdict::Swallow => silent = true,
                Verdict::Cut(bytes) => {
                    to.write_all(&piece[..bytes]).await?;
                    return Err(cut());
                }
                Verdict::DropReply => {
                    // First, or the reply might be quicker.
                    self.drop_reply.notify_one();
                    to.write_all(piece).await?;
                }
            }
        }
    }
}

/// Waits until the server has answered, and drops the answer.
async fn drop_reply(mut server: ReadHalf<'_>) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    let mut read = server.read(&mut buffer).await?;
    while read > 0 {
        read = match time::timeout(QUIET, server.read(&mut buffer)).await {
            Ok(more) => more?,
            Err(_) => break,
        };
    }
    Err(cut())
}

fn cut() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}
