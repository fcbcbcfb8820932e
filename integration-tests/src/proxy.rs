//! Trouble on the wire, between a client and one server.

mod faults;
mod pump;

use std::{
    net::{Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

use faults::Faults;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the client.
    ToServer,
    /// From the server.
    ToClient,
}

/// A TCP proxy on loopback that does what networks do.
///
/// It forwards until told otherwise, and takes all orders at run time. It lives in the runtime of
/// the test that started it, and ends when dropped.
///
/// ```no_run
/// # async fn a_test() -> anyhow::Result<()> {
/// # let server: std::net::SocketAddr = "127.0.0.1:3306".parse()?;
/// let proxy = integration_tests::proxy::Proxy::start(server, 42).await?;
/// let url = proxy.url("mysql://outbox:outbox@127.0.0.1:3306/test");
/// // .. connect to the URL ..
/// proxy.cut_reply_of(b"COMMIT");
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
    accepting: tokio::sync::Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    faults: Mutex<Faults>,
    /// Counts the orders to cut; each connection ends at the first one after its start.
    cuts: watch::Sender<u64>,
}

impl Proxy {
    /// Listens on a free port, for connections to that server. The seed decides all delays drawn.
    ///
    /// # Errors
    ///
    /// When there is no port to listen on.
    pub async fn start(server: SocketAddr, seed: u64) -> Result<Self> {
        let shared = Arc::new(Shared {
            faults: Mutex::new(Faults::none(server, seed)),
            cuts: watch::Sender::new(0),
        });
        let mut tries = 0;
        loop {
            let port = crate::native::ports::free()?;
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            let accepting = tokio::sync::Mutex::new(None);
            let proxy = Self { shared: Arc::clone(&shared), address, accepting };
            tries += 1;
            match proxy.accept().await {
                Ok(()) => return Ok(proxy),
                // Another process was quicker.
                Err(_) if tries < 5 => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Where clients connect to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A server's URL, led through this proxy.
    #[must_use]
    pub fn url(&self, url: &str) -> String {
        let (scheme, rest) = url.split_once("://").unwrap_or(("mysql", url));
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let user = authority.rfind('@').map_or("", |at| &authority[..=at]);
        format!("{scheme}://{user}{}{path}", self.address)
    }

    /// Sends connections that are made from now on to another server.
    pub fn dial(&self, server: SocketAddr) {
        self.faults().server = server;
    }

    /// Holds every piece of bytes of that direction back for a time drawn from this range.
    pub fn delay(&self, direction: Direction, time: RangeInclusive<Duration>) {
        self.faults().delay(direction, time);
    }

    /// Swallows all bytes of that direction, and keeps connections open: a network that lost its
    /// way, which only a timeout notices.
    pub fn swallow(&self, direction: Direction) {
        self.faults().swallow(direction);
    }

    /// Forwards at once again: ends delays and swallowing, and takes back cuts still to come.
    ///
    /// A connection that lost bytes stays silent, as what follows a gap would be garbage.
    pub fn heal(&self) {
        self.faults().heal();
    }

    /// Closes all connections, by a reset. New ones are accepted.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Cuts the connection that carries the last of the next `bytes` of that direction, after
    /// that byte. Happens once.
    pub fn cut_after(&self, direction: Direction, bytes: usize) {
        self.faults().cut_after(direction, bytes);
    }

    /// Cuts the connection on which a client next sends this text, before the server gets it.
    /// Happens once.
    ///
    /// The text must travel unencrypted: see
    /// [`PrivateDatabase::unencrypted`](crate::database::PrivateDatabase::unencrypted).
    pub fn cut_before(&self, text: &[u8]) {
        self.faults().cut_before(text);
    }

    /// Lets the server act on the next request with this text (`COMMIT`), then drops its reply and
    /// cuts the connection: the client cannot know what came of it. Happens once.
    ///
    /// The text must travel unencrypted, as for [`cut_before`](Self::cut_before).
    pub fn cut_reply_of(&self, text: &[u8]) {
        self.faults().cut_reply_of(text);
    }

    /// Makes every connection silent, both ways, on which a client sends this text, from that
    /// request on: the network loses one kind of request and no other. Until [`heal`](Self::heal).
    ///
    /// The text must travel unencrypted, as for [`cut_before`](Self::cut_before).
    pub fn silence(&self, text: &[u8]) {
        self.faults().silence(text);
    }

    /// How many of the cuts that happen once have happened.
    #[must_use]
    pub fn happened(&self) -> usize {
        self.faults().happened
    }

    /// Refuses new connections, as when no server listens. Those that exist stay.
    pub async fn refuse(&self) {
        if let Some(accepting) = self.accepting.lock().await.take() {
            accepting.abort();
            // Ended, and with it the listener.
            let _ = accepting.await;
        }
    }

    /// Accepts connections again after [`refuse`](Self::refuse).
    ///
    /// # Errors
    ///
    /// When something else took the port.
    pub async fn accept(&self) -> Result<()> {
        let mut accepting = self.accepting.lock().await;
        if accepting.is_none() {
            let listener = TcpListener::bind(self.address)
                .await
                .with_context(|| format!("the proxy's port {} is taken", self.address.port()))?;
            *accepting = Some(tokio::spawn(pump::accept(listener, Arc::clone(&self.shared))));
        }
        Ok(())
    }

    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.shared.faults()
    }
}

impl Shared {
    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(accepting) = self.accepting.get_mut() {
            accepting.abort();
        }
        self.cut();
    }
}

#[cfg(test)]
mod tests {
    use std::{future::Future, io::ErrorKind};

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
        time::{Instant, timeout},
    };

    use super::*;

    const SOON: Duration = Duration::from_secs(5);
    const NEVER: Duration = Duration::from_millis(200);

    /// Answers each piece with itself, and counts what it got.
    async fn echo() -> (SocketAddr, watch::Receiver<Vec<u8>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let got = watch::Sender::new(vec![]);
        let seen = got.subscribe();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let got = got.clone();
                tokio::spawn(async move {
                    let mut buffer = [0; 1024];
                    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                        got.send_modify(|got| got.extend_from_slice(&buffer[..read]));
                        let _ = stream.write_all(&buffer[..read]).await;
                    }
                });
            }
        });
        (address, seen)
    }

    async fn proxied() -> (Proxy, watch::Receiver<Vec<u8>>) {
        let (server, got) = echo().await;
        (Proxy::start(server, 7).await.unwrap(), got)
    }

    async fn connect(proxy: &Proxy) -> TcpStream {
        TcpStream::connect(proxy.address()).await.unwrap()
    }

    async fn exchange(stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
        stream.write_all(bytes).await?;
        let mut answer = vec![0; bytes.len()];
        stream.read_exact(&mut answer).await?;
        Ok(answer)
    }

    async fn soon<T>(future: impl Future<Output = T>) -> T {
        timeout(SOON, future).await.unwrap()
    }

    #[tokio::test]
    async fn bytes_pass_unchanged_and_an_orderly_end_too() {
        let (proxy, _) = proxied().await;
        let mut stream = connect(&proxy).await;
        assert_eq!(soon(exchange(&mut stream, b"hello")).await.unwrap(), b"hello");
        stream.shutdown().await.unwrap();
        assert_eq!(soon(stream.read(&mut [0; 8])).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_delay_holds_bytes_back() {
        let (proxy, _) = proxied().await;
        let mut stream = connect(&proxy).await;
        let delay = Duration::from_millis(50);
        proxy.delay(Direction::ToServer, delay..=delay);
        proxy.delay(Direction::ToClient, delay..=delay);
        let began = Instant::now();
        soon(exchange(&mut stream, b"hello")).await.unwrap();
        assert!(began.elapsed() >= 2 * delay);
    }

    #[tokio::test]
    async fn a_swallowed_direction_is_silent_and_stays_so_on_its_connection() {
        let (proxy, got) = proxied().await;
        let mut stream = connect(&proxy).await;
        soon(exchange(&mut stream, b"a")).await.unwrap();
        proxy.swallow(Direction::ToServer);
        timeout(NEVER, exchange(&mut stream, b"lost")).await.unwrap_err();
        proxy.heal();
        timeout(NEVER, exchange(&mut stream, b"lost as well")).await.unwrap_err();
        soon(exchange(&mut connect(&proxy).await, b"b")).await.unwrap();
        assert_eq!(*got.borrow(), b"ab");
    }

    #[tokio::test]
    async fn a_cut_resets_what_is_connected_and_spares_what_comes() {
        let (proxy, _) = proxied().await;
        let mut stream = connect(&proxy).await;
        soon(exchange(&mut stream, b"a")).await.unwrap();
        proxy.cut();
        let error = soon(stream.read(&mut [0; 8])).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        soon(exchange(&mut connect(&proxy).await, b"b")).await.unwrap();
    }

    #[tokio::test]
    async fn a_refused_connection_is_refused_until_accepted_again() {
        let (proxy, _) = proxied().await;
        let mut before = connect(&proxy).await;
        soon(exchange(&mut before, b"a")).await.unwrap();
        proxy.refuse().await;
        let error = TcpStream::connect(proxy.address()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        soon(exchange(&mut before, b"a")).await.unwrap();
        proxy.accept().await.unwrap();
        soon(exchange(&mut connect(&proxy).await, b"b")).await.unwrap();
    }

    #[tokio::test]
    async fn a_cut_after_some_bytes_lets_just_these_through() {
        let (proxy, mut got) = proxied().await;
        proxy.cut_after(Direction::ToServer, 3);
        let mut stream = connect(&proxy).await;
        stream.write_all(b"hello").await.unwrap();
        soon(got.wait_for(|got| got == b"hel")).await.unwrap();
        soon(exchange(&mut stream, b"more")).await.unwrap_err();
        assert_eq!(proxy.happened(), 1);
    }

    #[tokio::test]
    async fn a_request_is_cut_before_the_server_gets_it() {
        let (proxy, got) = proxied().await;
        proxy.cut_before(b"COMMIT");
        let mut stream = connect(&proxy).await;
        soon(exchange(&mut stream, b"BEGIN")).await.unwrap();
        soon(exchange(&mut stream, b"COMMIT")).await.unwrap_err();
        assert_eq!(*got.borrow(), b"BEGIN");
        assert_eq!(proxy.happened(), 1);
    }

    #[tokio::test]
    async fn the_reply_of_a_commit_is_dropped_once_the_server_has_it() {
        let (proxy, got) = proxied().await;
        proxy.cut_reply_of(b"COMMIT");
        let mut stream = connect(&proxy).await;
        soon(exchange(&mut stream, b"BEGIN")).await.unwrap();
        soon(exchange(&mut stream, b"COMMIT")).await.unwrap_err();
        assert_eq!(*got.borrow(), b"BEGINCOMMIT");
        assert_eq!(proxy.happened(), 1);
        let mut next = connect(&proxy).await;
        assert_eq!(soon(exchange(&mut next, b"COMMIT")).await.unwrap(), b"COMMIT");
    }

    #[tokio::test]
    async fn connections_with_a_text_fall_silent_and_no_other() {
        let (proxy, got) = proxied().await;
        proxy.silence(b"DELETE");
        let (mut one, mut other) = (connect(&proxy).await, connect(&proxy).await);
        soon(exchange(&mut one, b"a")).await.unwrap();
        timeout(NEVER, exchange(&mut one, b"DELETE")).await.unwrap_err();
        timeout(NEVER, exchange(&mut one, b"lost as well")).await.unwrap_err();
        soon(exchange(&mut other, b"b")).await.unwrap();
        timeout(NEVER, exchange(&mut connect(&proxy).await, b"DELETE")).await.unwrap_err();
        proxy.heal();
        soon(exchange(&mut connect(&proxy).await, b"DELETE")).await.unwrap();
        assert_eq!(*got.borrow(), b"abDELETE");
    }

    #[tokio::test]
    async fn without_a_server_a_connection_is_reset() {
        let proxy = Proxy::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)), 7).await.unwrap();
        let mut stream = connect(&proxy).await;
        let error = soon(stream.read(&mut [0; 8])).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_url_is_led_through_the_proxy() {
        let proxy = Proxy::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)), 7).await.unwrap();
        let port = proxy.address().port();
        let led = proxy.url("mysql://u:p@localhost:3306/db?ssl-mode=DISABLED");
        assert_eq!(led, format!("mysql://u:p@127.0.0.1:{port}/db?ssl-mode=DISABLED"));
    }
}
