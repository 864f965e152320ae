//! The accept loop: connections get a slot and deadlines, and are let go of one by one when the service stops.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use prometheus::IntGauge;
use tokio::io::AsyncRead;
use tokio::pin;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, error};

use crate::access::peer::{Origin, Peer};
use crate::server::buffers::{BUFFERING_MAX, BufferAccount, BufferLimit};
use crate::server::client_limit::{ClientConnectionLimit, ClientPermit};
use crate::server::fast_path::{self, Exchange, Exit, FastPath};
use crate::server::idle::{Activity, IdleConnections};
use crate::server::listener::{Acceptor, Listener, Stream};
use crate::server::memory;
use crate::server::timeouts::{TimeoutStream, Timeouts, Transport};
use crate::server::tls::Tls;
use crate::server::unacknowledged::UnacknowledgedSockets;
use crate::telemetry::metrics::{AcceptError, KeyFailure, Metrics, Rejection};

/// The largest request head, in bytes; hyper answers a larger one with 431.
pub const HEAD_MAX: usize = 16 * 1024;

/// Connections above the limit that are still accepted, to be told 503 and to have their health answered.
pub const OVER_LIMIT_CONNECTIONS: usize = 256;

/// How long such a connection may take for its one request, and how long a head may take once the drain has begun.
const OVER_LIMIT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long it is left in peace when even the crowd is full and others wait to be accepted.
const EVICTION_GRACE: Duration = Duration::from_millis(250);

/// How long an accept loop may go on to empty its queue when the drain begins: a client that keeps coming must not hold it.
const ACCEPT_DRAIN: Duration = Duration::from_millis(20);

/// How long open connections are still read from after the drain began, so that a request which is on its way gets its
/// answer instead of a reset.
const READ_LINGER: Duration = Duration::from_millis(250);

/// How often the kernel is asked whether clients have acknowledged the last bytes and the end of their connections.
const ACKNOWLEDGED_INTERVAL: Duration = Duration::from_millis(20);

/// How long the process stays for clients that were reset, and for the acknowledgement of what was sent last.
const RESET_GRACE: Duration = Duration::from_millis(250);

/// With so many connections more may come, and their memory is to be given back.
const FEW: usize = 16;

/// How long to wait after accept(2) has failed for a reason that is not the connection's.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// How many connections in a row may fail by themselves before that counts as a persistent failure.
const ACCEPT_FAILURES_MAX: u32 = 100;

/// How often that is logged.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Whether a connection got one of the slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionClass {
    /// It did.
    Normal,
    /// All were taken: it may ask for health and is told 503 for the rest.
    OverLimit,
    /// Its client has its share already: the same.
    OverClientLimit,
}

impl ConnectionClass {
    /// Why what a connection asks for is refused; `None` if it is not.
    pub fn failure(self) -> Option<KeyFailure> {
        match self {
            Self::Normal => None,
            Self::OverLimit => Some(KeyFailure::Connections),
            Self::OverClientLimit => Some(KeyFailure::ClientConnections),
        }
    }
}

/// The connection slots that the listeners of one role share.
#[derive(Debug)]
pub struct ConnectionLimit {
    /// Those that have one.
    seated: AtomicUsize,
    /// All connections.
    open: AtomicUsize,
    /// How many connections there ever were.
    taken: AtomicU64,
    limit: usize,
    /// How many more are accepted.
    over_limit: usize,
    freed: Notify,
    /// Those that have one, of which an idle one closes for a new connection.
    idle: IdleConnections,
    /// The tasks of connections without a slot, and since when they are there; the oldest first.
    crowd: Mutex<VecDeque<(Instant, AbortHandle)>>,
    /// Every accept loop holds a receiver; nothing is ever sent.
    accepting: watch::Sender<()>,
}

impl ConnectionLimit {
    /// Slots for `limit` connections, and `over_limit` more that get none.
    pub fn new(limit: usize, over_limit: usize) -> Self {
        Self {
            seated: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            taken: AtomicU64::new(0),
            limit,
            over_limit,
            freed: Notify::new(),
            idle: IdleConnections::new(),
            crowd: Mutex::new(VecDeque::with_capacity(2 * over_limit)),
            accepting: watch::Sender::new(()),
        }
    }

    /// Returns when a connection may be accepted: at once, unless even the crowd is full. Then its oldest has to go, and is
    /// counted in `metrics`: it was closed before its request was read.
    async fn ready(&self, metrics: &Metrics) {
        loop {
            let freed = self.freed.notified();
            if self.open.load(Ordering::Relaxed) < self.limit + self.over_limit {
                return;
            }
            let _ = timeout_at(self.evict(metrics), freed).await;
        }
    }

    /// Ends the oldest connection without a slot, if it had its time. Returns when to look again.
    fn evict(&self, metrics: &Metrics) -> Instant {
        let (mut crowd, now) = (self.crowd(), Instant::now());
        while crowd.front().is_some_and(|(_, task)| task.is_finished()) {
            crowd.pop_front();
        }
        match crowd.front() {
            Some((since, _)) if *since + EVICTION_GRACE > now => return *since + EVICTION_GRACE,
            Some((_, oldest)) => {
                oldest.abort();
                metrics.rejected(Rejection::Connections);
            }
            None => {}
        }
        crowd.pop_front();
        now + EVICTION_GRACE
    }

    /// Keeps at hand how to end a connection without a slot.
    fn register(&self, task: AbortHandle) {
        let mut crowd = self.crowd();
        if crowd.len() == crowd.capacity() {
            crowd.retain(|(_, task)| !task.is_finished());
        }
        crowd.push_back((Instant::now(), task));
    }

    fn crowd(&self) -> MutexGuard<'_, VecDeque<(Instant, AbortHandle)>> {
        self.crowd.lock().unwrap_or_else(PoisonError::into_inner) // nothing that can panic is done under it
    }

    /// Returns when there has been no connection in any of `slots` for `period`, give or take a second.
    pub async fn idle_for(slots: &[&Self], period: Duration) {
        let second = Duration::from_secs(1);
        let mut quiet = Duration::ZERO;
        let mut taken = 0;
        while quiet < period {
            tokio::time::sleep(second).await;
            let now: u64 = slots.iter().map(|slots| slots.taken.load(Ordering::Relaxed)).sum();
            let is_quiet = slots.iter().all(|slots| slots.are_empty()) && now == taken;
            quiet = if is_quiet { quiet + second } else { Duration::ZERO };
            taken = now;
        }
    }

    fn are_empty(&self) -> bool {
        self.open() == 0
    }

    /// How many connections there are.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// A seat for one more connection. If all slots are taken, it gets that of the connection that has been idle for longest,
    /// which closes. Over-limit connections take no slot from others: if they keep coming, they would take each one that is
    /// given back, and no client would get a key.
    fn class(&self, is_excess: bool, evicts: bool) -> ConnectionClass {
        self.taken.fetch_add(1, Ordering::Relaxed);
        self.open.fetch_add(1, Ordering::Relaxed);
        match is_excess {
            true => ConnectionClass::OverClientLimit,
            false if self.take_slot(evicts) => ConnectionClass::Normal,
            false => ConnectionClass::OverLimit,
        }
    }

    fn take_slot(&self, evicts: bool) -> bool {
        let is_taken =
            self.seated.fetch_add(1, Ordering::Relaxed) < self.limit || (evicts && self.idle.evict());
        if !is_taken {
            self.seated.fetch_sub(1, Ordering::Relaxed);
        }
        is_taken
    }

    fn leave(&self, class: ConnectionClass) {
        if class == ConnectionClass::Normal {
            self.seated.fetch_sub(1, Ordering::Relaxed);
        }
        if self.open.fetch_sub(1, Ordering::Relaxed) >= self.limit + self.over_limit {
            self.freed.notify_waiters();
        }
    }
}

/// What every connection of a server is held to.
#[derive(Debug, Clone)]
pub struct ServerContext {
    /// Deadlines of a connection with a slot.
    pub timeouts: Arc<Timeouts>,
    /// Deadlines of one without.
    pub over_limit_timeouts: Arc<Timeouts>,
    /// The slots.
    pub slots: Arc<ConnectionLimit>,
    /// Where failures are counted.
    pub metrics: Arc<Metrics>,
    /// The gauge of open connections, where they count.
    pub gauge: Option<IntGauge>,
    /// Who the service is, where connections over TCP are encrypted. Those of Unix sockets never leave the host.
    pub tls: Option<Arc<Tls>>,
    /// How many of them each client may have, where that is bounded.
    pub client_limit: Option<Arc<ClientConnectionLimit>>,
    /// How many connections may hold buffers.
    pub buffers: Arc<BufferLimit>,
    /// Whether [`Accepted::identified`] follows, before which a connection takes no slot from an idle one: its client may
    /// have as many as it may.
    pub identifies: bool,
}

impl ServerContext {
    /// For `slots`.
    pub fn new(slots: ConnectionLimit, timeouts: Timeouts, metrics: Arc<Metrics>) -> Self {
        Self {
            over_limit_timeouts: Arc::new(timeouts.at_most(OVER_LIMIT_TIMEOUT)),
            timeouts: Arc::new(timeouts),
            slots: Arc::new(slots),
            metrics,
            gauge: None,
            tls: None,
            client_limit: None,
            buffers: Arc::new(BufferLimit::new(BUFFERING_MAX)),
            identifies: false,
        }
    }

    fn timeouts(&self, class: ConnectionClass) -> &Arc<Timeouts> {
        match class {
            ConnectionClass::Normal => &self.timeouts,
            ConnectionClass::OverLimit | ConnectionClass::OverClientLimit => &self.over_limit_timeouts,
        }
    }

    /// Speaks TLS on TCP.
    #[must_use]
    pub fn with_tls(mut self, tls: Option<Arc<Tls>>) -> Self {
        self.tls = tls;
        self
    }

    /// Shows the open connections on `gauge`.
    #[must_use]
    pub fn with_gauge(mut self, gauge: IntGauge) -> Self {
        self.gauge = Some(gauge);
        self
    }

    /// Bounds the connections of each client.
    #[must_use]
    pub fn with_client_limit(mut self, client_limit: Option<Arc<ClientConnectionLimit>>) -> Self {
        self.client_limit = client_limit;
        self
    }

    /// Waits for [`Accepted::identified`] before a connection takes the slot of an idle one.
    #[must_use]
    pub fn identifying(mut self, identifies: bool) -> Self {
        self.identifies = identifies;
        self
    }
}

/// How far a server is on its way to the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Accepting.
    Serving,
    /// Accepting no more; open connections are served.
    Draining,
    /// Idle connections close, busy ones after their answer.
    Closing,
    /// Servers return, whatever is still open.
    Aborting,
}

/// Moves all servers from one phase to the next.
#[derive(Debug)]
pub struct Drain(watch::Sender<Phase>);

impl Drain {
    /// Everything serves.
    #[expect(clippy::new_without_default, reason = "it is made once, by name")]
    pub fn new() -> Self {
        Self(watch::Sender::new(Phase::Serving))
    }

    /// A view for a server.
    pub fn watch(&self) -> watch::Receiver<Phase> {
        self.0.subscribe()
    }

    /// Stops accepting; after a moment in which requests on their way are still read, lets idle connections go.
    /// Returns then; busy connections may still be there.
    pub async fn begin(&self, context: &[&ServerContext]) {
        for timeouts in all_timeouts(context) {
            timeouts.keep_ended_connections();
        }
        self.0.send_replace(Phase::Draining);
        // Only then is it known who is here. A worker that is blocked is not waited for.
        for context in context {
            let _ = timeout(READ_LINGER, context.slots.accepting.closed()).await;
        }
        if context.iter().any(|context| !context.slots.are_empty()) {
            tokio::time::sleep(READ_LINGER).await;
        }
        for context in context {
            context.timeouts.shorten_reads(OVER_LIMIT_TIMEOUT);
        }
        self.0.send_replace(Phase::Closing);
    }

    /// Returns when the clients of all connections that have ended have acknowledged their last bytes and their end. Until
    /// then the network that these are sent through has to stay, and in a pod or a container it goes away with the process.
    pub async fn acknowledged(&self, context: &[&ServerContext], ports: &[u16]) {
        while self.close_acknowledged(context, ports) > 0 {
            tokio::time::sleep(ACKNOWLEDGED_INTERVAL).await;
        }
    }

    /// Closes the ended connections whose clients have all of them, and returns how many others there are. `ports` are
    /// those of the listeners: connections that were closed before the drain are found by them.
    pub fn close_acknowledged(&self, context: &[&ServerContext], ports: &[u16]) -> usize {
        let sockets = UnacknowledgedSockets::look(ports);
        let kept =
            all_timeouts(context).map(|timeouts| timeouts.ended_connections().close_acknowledged(&sockets));
        kept.sum::<usize>() + sockets.orphans()
    }

    /// Makes every server return at once. Its runtime is to be dropped then, which resets the connections that are left.
    pub fn abort(&self, context: &[&ServerContext]) {
        for timeouts in all_timeouts(context) {
            timeouts.reset_connections();
        }
        self.0.send_replace(Phase::Aborting);
    }

    /// Resets the ended connections whose clients don't have all of them. Returns once those that were reset, and those
    /// that [`Drain::abort`] reset, have had a moment: a client that has lost a segment answers a reset by a question (RFC
    /// 5961 section 3.2), which the kernel answers only while the network is there.
    pub fn reset_ended(&self, context: &[&ServerContext], ports: &[u16]) {
        thread::sleep(RESET_GRACE);
        if self.close_acknowledged(context, ports) > 0 {
            all_timeouts(context).for_each(|timeouts| timeouts.ended_connections().reset());
            thread::sleep(RESET_GRACE);
        }
    }
}

fn all_timeouts<'a>(context: &'a [&ServerContext]) -> impl Iterator<Item = &'a Timeouts> {
    context.iter().flat_map(|context| [&*context.timeouts, &*context.over_limit_timeouts])
}

/// Asks accept loops for a sign of life and sees who gave one: a worker whose thread is blocked gives none.
#[derive(Debug)]
pub struct Heartbeats {
    ask: watch::Sender<u64>,
    answers: Vec<Arc<AtomicU64>>,
}

impl Heartbeats {
    /// Nobody to ask yet.
    #[expect(clippy::new_without_default, reason = "it is made once, by name")]
    pub fn new() -> Self {
        Self { ask: watch::Sender::new(0), answers: Vec::new() }
    }

    /// The side of one accept loop.
    pub fn join(&mut self) -> Heartbeat {
        let answer = Arc::new(AtomicU64::new(*self.ask.borrow()));
        self.answers.push(Arc::clone(&answer));
        Heartbeat { asked: self.ask.subscribe(), answer }
    }

    /// Forgets the last `count` that joined: their accept loops were never started.
    pub fn withdraw(&mut self, count: usize) {
        self.answers.truncate(self.answers.len().saturating_sub(count));
    }

    /// Whether every accept loop has answered the last question.
    pub fn have_answered(&self) -> bool {
        let asked = *self.ask.borrow();
        self.answers.iter().all(|answer| answer.load(Ordering::Relaxed) == asked)
    }

    /// Whether everyone answered the last question; then asks again.
    pub fn all_answered(&self) -> bool {
        let all = self.have_answered();
        self.ask.send_modify(|asked| *asked += 1);
        all
    }
}

/// An accept loop's side of [`Heartbeats`].
#[derive(Debug)]
pub struct Heartbeat {
    asked: watch::Receiver<u64>,
    answer: Arc<AtomicU64>,
}

impl Heartbeat {
    async fn beat(&mut self) -> Infallible {
        while self.asked.changed().await.is_ok() {
            self.answer.store(*self.asked.borrow_and_update(), Ordering::Relaxed);
        }
        std::future::pending().await // nobody asks any more
    }
}

/// A connection that was accepted, with all that it is held to. Dropping it gives back its slot.
#[derive(Debug)]
pub struct Accepted {
    /// Its bytes.
    pub stream: Stream,
    /// Who is at the other end.
    pub peer: Peer,
    phase: watch::Receiver<Phase>,
    guard: ConnectionGuard,
}

impl Accepted {
    /// Its bytes under the deadlines of its seat, who is at the other end, and what has to be kept until its end.
    pub fn open(self) -> (TimeoutStream<Stream>, Peer, impl Send) {
        let timeouts = Arc::clone(self.guard.context.timeouts(self.guard.class));
        (TimeoutStream::new(self.stream, timeouts), self.peer, self.guard)
    }

    /// Runs `task` with it. A task of a connection without a slot is ended early when even those are too many.
    pub fn spawn<F>(self, task: impl FnOnce(Self) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let over_limit = self.guard.over_limit();
        spawn(over_limit, task(self));
    }

    /// What `read` gives, if that takes no longer than a request header may, and no longer than a second once idle
    /// connections close.
    pub async fn within_head_timeout<T>(&self, read: impl Future<Output = T>) -> Option<T> {
        let read = timeout(self.guard.context.timeouts(self.guard.class).head(), read);
        pin!(read);
        let mut phase = self.phase.clone();
        tokio::select! {
            biased;
            read = read.as_mut() => read.ok(),
            () = wait_for_phase(&mut phase, Phase::Closing) => timeout(OVER_LIMIT_TIMEOUT, read).await.ok()?.ok(),
        }
    }

    /// Whether idle connections close by now.
    pub fn is_closing(&self) -> bool {
        *self.phase.borrow() >= Phase::Closing
    }

    /// Counts it from now on for `client`, whom a proxy named, or still for its own address. Returns whether the client may
    /// have it: a connection over its limit gives back its slot, and is one that gets a 503; beyond those it must be closed.
    pub fn identified(&mut self, client: Option<IpAddr>) -> bool {
        if let Some(origin) = client.map(Origin::Ip) {
            let context = &self.guard.context;
            let Some(share) = ClientConnectionLimit::take(context.client_limit.as_ref(), origin) else {
                context.metrics.rejected(Rejection::ClientConnections);
                return false;
            };
            if share.is_excess() {
                self.guard.give_up_slot();
            }
            self.guard.share = share;
            self.peer.origin = origin;
        }
        self.guard.ask_for_slot();
        true
    }
}

/// Serves `listeners` until the drain is over, or aborted. `begin` starts a task for each connection, such as [`http`] makes.
///
/// Runs on the calling thread's runtime; the connections it accepts stay there.
///
/// # Errors
/// When the runtime can't take a listener.
pub async fn serve(
    listeners: Vec<(Listener, Heartbeat)>,
    begin: impl Fn(Accepted) + Clone + Send + 'static,
    context: ServerContext,
    mut phase: watch::Receiver<Phase>,
) -> io::Result<()> {
    let context = Arc::new(context);
    // Every accept loop and connection holds a sender; nothing is ever sent.
    let (alive, mut all_gone) = mpsc::channel::<Infallible>(1);
    for (listener, heartbeat) in listeners {
        let acceptor = listener.into_acceptor()?;
        tokio::spawn(accept(
            acceptor,
            heartbeat,
            begin.clone(),
            Arc::clone(&context),
            phase.clone(),
            alive.clone(),
        ));
    }
    drop(alive);
    tokio::select! {
        _ = all_gone.recv() => {}
        () = wait_for_phase(&mut phase, Phase::Aborting) => {}
    }
    Ok(())
}

/// HTTP on each connection. `service` makes the service of one.
pub fn http<F, S, B>(service: F) -> impl Fn(Accepted) + Clone + Send + 'static
where
    F: Fn(ConnectionClass, Peer) -> S + Clone + Send + 'static,
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>
        + FastPath
        + Send
        + Sync
        + 'static,
    S::Future: Send + Unpin,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    move |Accepted { stream, peer, phase, guard }| {
        let class = guard.class;
        let buffers = BufferAccount::new(Arc::clone(&guard.context.buffers), peer.origin.into());
        let timed = |stream| TimeoutStream::new(stream, Arc::clone(guard.context.timeouts(class)));
        let over_limit = guard.over_limit();
        match (&guard.context.tls, stream) {
            (Some(tls), stream @ Stream::Tcp(_)) => {
                let (tls, stream, service) = (Arc::clone(tls), timed(stream), service.clone());
                spawn(over_limit, async move {
                    let service = move |identity| service(class, Peer { identity, ..peer });
                    with_tls(stream, &tls, service, phase, &guard, buffers).await;
                });
            }
            (_, stream) => {
                let (stream, service) = (timed(stream), service(class, peer));
                // In a box, since the runtime moves a task's future several times.
                let task = async move {
                    let activity = Arc::clone(&guard.activity);
                    connection(stream, service, phase, &guard.context.metrics, buffers, activity).await;
                };
                spawn(over_limit, Box::pin(task));
            }
        }
    }
}

/// Runs the task of a connection. Without a slot among those of `over_limit`, it ends early when even such are too many.
fn spawn(over_limit: Option<Arc<ConnectionLimit>>, task: impl Future<Output = ()> + Send + 'static) {
    let task = tokio::spawn(task);
    if let Some(slots) = over_limit {
        slots.register(task.abort_handle());
    }
}

async fn accept(
    acceptor: Acceptor,
    mut heartbeat: Heartbeat,
    begin: impl Fn(Accepted) + Clone + Send + 'static,
    context: Arc<ServerContext>,
    phase: watch::Receiver<Phase>,
    alive: mpsc::Sender<Infallible>,
) {
    let mut last_logged: Option<Instant> = None;
    let mut has_put_aside = false;
    let mut failures = 0;
    let mut sweeping: Option<Instant> = None;
    let _accepting = context.slots.accepting.subscribe();
    // Both wait in one place for the life of the loop, instead of joining and leaving it for each connection.
    let mut stopping = phase.clone();
    let draining = wait_for_phase(&mut stopping, Phase::Draining);
    pin!(draining);
    let beat = heartbeat.beat();
    pin!(beat);
    loop {
        let next = async {
            context.slots.ready(&context.metrics).await;
            acceptor.accept().await
        };
        // Closing a socket that was bound here resets whoever is in its queue: they are taken first.
        let accepted = if let Some(since) = sweeping {
            if since.elapsed() > ACCEPT_DRAIN {
                return;
            }
            let Some(accepted) = try_now(next).await else {
                return;
            };
            accepted
        } else {
            tokio::select! {
                biased;
                () = draining.as_mut() => {
                    sweeping = Some(Instant::now());
                    continue;
                }
                never = beat.as_mut() => match never {},
                accepted = next => accepted,
            }
        };
        match accepted {
            Ok((stream, peer)) => {
                failures = 0;
                let Some(share) = ClientConnectionLimit::take(context.client_limit.as_ref(), peer.origin)
                else {
                    // Those who were told 503 are many already; dropped here, it holds nothing.
                    context.metrics.rejected(Rejection::ClientConnections);
                    continue;
                };
                let class = context.slots.class(share.is_excess(), !context.identifies);
                if !has_put_aside && context.slots.open() > FEW {
                    has_put_aside = true;
                    memory::put_aside();
                }
                let guard = ConnectionGuard::new(Arc::clone(&context), class, alive.clone(), share);
                begin(Accepted { stream, peer, phase: phase.clone(), guard });
            }
            Err(error) => {
                let kind = AcceptError::of(&error);
                context.metrics.accept_failed(kind);
                failures += 1;
                if kind == AcceptError::Connection && failures <= ACCEPT_FAILURES_MAX {
                    debug!(%error, "connection was closed before it was accepted");
                    continue;
                }
                // The connection stays in the queue, or the listener itself is broken: waiting is all there is.
                if last_logged.is_none_or(|last| last.elapsed() > LOG_INTERVAL) {
                    last_logged = Some(Instant::now());
                    error!(%error, "failed to accept connections: {}", kind.reason());
                }
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

/// Serves one connection to its end: TLS, and HTTP/1.1 inside. The deadlines are below both, as stalls are.
async fn with_tls<S, B>(
    stream: TimeoutStream<Stream>,
    tls: &Tls,
    service: impl FnOnce(Option<Arc<str>>) -> S,
    mut phase: watch::Receiver<Phase>,
    guard: &ConnectionGuard,
    buffers: BufferAccount,
) where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + FastPath,
    S::Future: Unpin,
    B: Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (head, serving) = (stream.timeouts().head(), phase.clone());
    // In boxes, the handshake and what follows it: a task keeps the memory of its largest state for as long as its
    // connection lives, and that of a handshake is thrice what an idle connection needs.
    let mut handshake = Box::pin(async move {
        let (stream, identity) = tls.handshake(stream, head, &guard.share).await?;
        let (metrics, activity) = (&guard.context.metrics, Arc::clone(&guard.activity));
        Some(Box::pin(connection(stream, service(identity), serving, metrics, buffers, activity)))
    });
    let connection = tokio::select! {
        biased;
        connection = handshake.as_mut() => connection,
        () = wait_for_phase(&mut phase, Phase::Closing) => timeout(OVER_LIMIT_TIMEOUT, handshake.as_mut()).await.unwrap_or_default(),
    };
    drop(handshake);
    if let Some(connection) = connection {
        connection.await;
    }
}

/// Serves one connection to its end: HTTP/1.1, as strictly as the service wants it. Plain requests go the short way;
/// another one goes by hyper, which gives the connection back when it has answered.
pub fn connection<I, S, B>(
    io: I,
    service: S,
    mut phase: watch::Receiver<Phase>,
    metrics: &Metrics,
    buffers: BufferAccount,
    activity: Arc<Activity>,
) -> impl Future<Output = ()>
where
    I: AsyncRead + Transport + Send + Unpin + 'static,
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + FastPath,
    S::Future: Unpin,
    B: Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    // Outside of the future, which would hold what it is made of, too: there is one for each connection.
    let mut plain = fast_path::Connection::new(io, service, metrics, buffers, activity);
    async move {
        loop {
            let poll = |cx: &mut Context<'_>, is_closing| match plain.poll_serve(cx) {
                Poll::Pending if plain.is_evicted() => {
                    metrics.idle_connections_closed.inc();
                    Poll::Ready(Ok(Exit::Closed))
                }
                // A response that is in flight is sent first.
                Poll::Pending if is_closing && plain.is_idle() => Poll::Ready(Ok(Exit::Handover)),
                end => end,
            };
            match poll_until_closing(&mut phase, poll).await {
                Ok(Exit::Closed) => return,
                // In a box, since most connections never need it.
                Ok(Exit::Handover) => match Box::pin(serve_with_hyper(&mut plain, &mut phase, metrics)).await
                {
                    SlowPathExit::Closed => return,
                    SlowPathExit::Reset => return plain.forget_unsent(),
                    SlowPathExit::Handover(unread) => plain.resume(unread),
                },
                Err(problem) => {
                    debug!(error = %problem, "a connection ended early");
                    return;
                }
            }
        }
    }
}

/// How hyper leaves a connection.
enum SlowPathExit {
    /// At its end.
    Closed,
    /// With nothing that may be taken for its end: its body failed, or another connection needs its buffers.
    Reset,
    /// Between two requests; these bytes were read and not used.
    Handover(Vec<u8>),
}

/// Serves a connection by hyper until every request that it has read is answered.
async fn serve_with_hyper<I, S, B>(
    plain: &mut fast_path::Connection<'_, I, S>,
    phase: &mut watch::Receiver<Phase>,
    metrics: &Metrics,
) -> SlowPathExit
where
    I: AsyncRead + Transport + Send + Unpin,
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + FastPath,
    S::Future: Unpin,
    B: Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let exchange = Exchange::default();
    let (buffers, has_answered) = (plain.buffers().clone(), plain.has_answered());
    let (io, service) = plain.lend(&exchange);
    let mut connection = http1::Builder::new()
        .max_buf_size(HEAD_MAX)
        // A client may close its sending side after its request and still read the answer.
        .half_close(true)
        .serve_connection(TokioIo::new(io), TrackRequests { service, exchange: &exchange });
    let mut held = None;
    let mut is_stopping = false;
    let result = poll_until_closing(phase, |cx, is_closing| {
        if is_closing && !is_stopping {
            is_stopping = true;
            // Without an answer yet, it has just come and would be closed unheard. Its first request is still waited
            // for, as long as a head may take by now, and its answer ends the connection.
            if has_answered || exchange.is_started() {
                Pin::new(&mut connection).graceful_shutdown();
            }
        }
        match Pin::new(&mut connection).poll(cx) {
            Poll::Ready(result) => Poll::Ready(Some(result)),
            Poll::Pending if exchange.is_over() => Poll::Ready(None),
            Poll::Pending if exchange.is_streaming() => {
                held = None; // it has a permit, of which there are few, and may be read slowly
                Poll::Pending
            }
            Poll::Pending => {
                let held = held.get_or_insert_with(|| buffers.hold(cx.waker()));
                if held.is_evicted() { Poll::Ready(None) } else { Poll::Pending }
            }
        }
    });
    match result.await {
        Some(Ok(())) => SlowPathExit::Closed,
        Some(Err(problem)) => {
            // Which peer and which bytes it was is nobody's business; that it happens is counted.
            if problem.is_parse() {
                metrics.rejected(Rejection::Malformed);
            }
            debug!(error = %problem, "a connection ended early");
            if problem.is_user() { SlowPathExit::Reset } else { SlowPathExit::Closed }
        }
        None if exchange.is_over() => {
            let parts = connection.into_parts();
            let mut unread = parts.read_buf.to_vec();
            unread.extend_from_slice(&parts.io.into_inner().finish());
            SlowPathExit::Handover(unread)
        }
        None => {
            metrics.rejected(Rejection::Buffers);
            SlowPathExit::Reset
        }
    }
}

/// What `poll` gives, which is told whether the drain is at its end, and polled when it is.
async fn poll_until_closing<T>(
    phase: &mut watch::Receiver<Phase>,
    mut poll: impl FnMut(&mut Context<'_>, bool) -> Poll<T>,
) -> T {
    let changes = phase.clone();
    let closing = wait_for_phase(phase, Phase::Closing);
    pin!(closing);
    let (mut is_watching, mut is_closing) = (false, false);
    poll_fn(move |cx| {
        // Polled for every request, the phase took 170 instructions of each. A task's waker stays the same, so once it
        // is left there, it is enough to look again after a change.
        if !is_closing && (!is_watching || changes.has_changed().unwrap_or(true)) {
            is_watching = true;
            is_closing = closing.as_mut().poll(cx).is_ready();
        }
        poll(cx, is_closing)
    })
    .await
}

/// A service that notes on its way what is asked of it, and lets other connections have a turn between requests that
/// came together: each may be half a millisecond of work.
struct TrackRequests<'a, S> {
    service: &'a S,
    exchange: &'a Exchange,
}

impl<S> Service<Request<Incoming>> for TrackRequests<'_, S>
where
    S: Service<Request<Incoming>, Future: Unpin>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Paced<S::Future>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let is_first = !self.exchange.is_started();
        self.exchange.start(!request.body().is_end_stream());
        Paced { future: self.service.call(request), has_yielded: is_first }
    }
}

/// A future that may let other tasks have a turn before it ends.
struct Paced<F> {
    future: F,
    has_yielded: bool,
}

impl<F: Future + Unpin> Future for Paced<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        if !std::mem::replace(&mut self.has_yielded, true) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Pin::new(&mut self.future).poll(cx)
    }
}

/// What `next` gives without waiting, once the runtime has looked at its sockets again; `None` where it would wait.
async fn try_now<T>(next: impl Future<Output = T>) -> Option<T> {
    tokio::task::yield_now().await;
    tokio::select! {
        biased;
        taken = next => Some(taken),
        () = std::future::ready(()) => None,
    }
}

async fn wait_for_phase(phase: &mut watch::Receiver<Phase>, wanted: Phase) {
    // An error says that whoever leads the phases is gone, and with it the whole service.
    let _ = phase.wait_for(|phase| *phase >= wanted).await;
}

/// An open connection: leaving gives back its slot.
#[derive(Debug)]
struct ConnectionGuard {
    context: Arc<ServerContext>,
    /// Whether it got a slot.
    class: ConnectionClass,
    /// Whether it is idle.
    activity: Arc<Activity>,
    _alive: mpsc::Sender<Infallible>,
    share: ClientPermit,
}

impl ConnectionGuard {
    fn new(
        context: Arc<ServerContext>,
        class: ConnectionClass,
        alive: mpsc::Sender<Infallible>,
        share: ClientPermit,
    ) -> Self {
        if let Some(gauge) = &context.gauge {
            gauge.inc();
        }
        let activity = context.slots.idle.activity();
        if class == ConnectionClass::Normal {
            context.slots.idle.add(&activity);
        }
        Self { context, class, activity, _alive: alive, share }
    }

    /// The slots of which it has none; `None` if it has one.
    fn over_limit(&self) -> Option<Arc<ConnectionLimit>> {
        (self.class != ConnectionClass::Normal).then(|| Arc::clone(&self.context.slots))
    }

    /// Takes the slot of an idle connection, if all were taken when this one was accepted.
    fn ask_for_slot(&mut self) {
        if self.class == ConnectionClass::OverLimit && self.context.slots.take_slot(true) {
            self.class = ConnectionClass::Normal;
            self.context.slots.idle.add(&self.activity);
        }
    }

    /// Gives back the slot of a connection that stays open without one.
    fn give_up_slot(&mut self) {
        if std::mem::replace(&mut self.class, ConnectionClass::OverClientLimit) == ConnectionClass::Normal {
            self.context.slots.idle.remove(&self.activity);
            self.context.slots.seated.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        if let Some(gauge) = &self.context.gauge {
            gauge.dec();
        }
        if self.class == ConnectionClass::Normal {
            self.context.slots.idle.remove(&self.activity);
        }
        self.context.slots.leave(self.class);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::peer::Client;
    use crate::server::fast_path::SlowPathOnly;
    use crate::server::listener::{Host, Mode};
    use hyper::service::service_fn;
    use std::future::ready;
    use std::io::Write;
    use std::sync::mpsc as blocking;

    const OVER_LIMIT: usize = OVER_LIMIT_CONNECTIONS;

    /// A server on a thread of its own, whose service does not return before it is told to.
    #[test]
    fn a_worker_that_is_blocked_gives_no_sign_of_life() {
        let listener = Listener::bind(&"127.0.0.1".parse::<Host>().unwrap(), 0, Mode::default()).unwrap();
        let address = listener.to_string();
        let mut heartbeats = Heartbeats::new();
        let heartbeat = heartbeats.join();
        let drain = Drain::new();
        let phase = drain.watch();
        let context = ServerContext::new(
            ConnectionLimit::new(8, 8),
            Timeouts::new(OVER_LIMIT_TIMEOUT, OVER_LIMIT_TIMEOUT, OVER_LIMIT_TIMEOUT),
            Arc::new(Metrics::new()),
        );
        let (entered, is_entered) = blocking::channel();
        let (release, is_released) = blocking::channel::<()>();
        let is_released = Arc::new(Mutex::new(is_released));
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let service = move |_: ConnectionClass, _: Peer| {
                let (entered, is_released) = (entered.clone(), Arc::clone(&is_released));
                SlowPathOnly(service_fn(move |_: Request<Incoming>| {
                    entered.send(()).unwrap();
                    let _ = is_released.lock().unwrap().recv();
                    ready(Ok(Response::new(String::new())))
                }))
            };
            runtime.block_on(serve(vec![(listener, heartbeat)], http(service), context, phase)).unwrap();
        });
        let answers = |heartbeats: &Heartbeats| {
            // It has been asked by the call before; a worker that moves answers within milliseconds.
            heartbeats.all_answered();
            (0..400).any(|_| {
                thread::sleep(Duration::from_millis(5));
                heartbeats.answers[0].load(Ordering::Relaxed) == *heartbeats.ask.borrow()
            })
        };
        assert!(answers(&heartbeats), "an idle worker answers");
        let mut client = std::net::TcpStream::connect(address).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        is_entered.recv().unwrap();
        assert!(!answers(&heartbeats), "a blocked one does not");
        assert!(!heartbeats.all_answered());
        release.send(()).unwrap();
        assert!(answers(&heartbeats), "and does again");
    }

    #[test]
    fn an_accept_loop_that_was_never_started_is_not_waited_for() {
        let mut heartbeats = Heartbeats::new();
        let started = heartbeats.join();
        drop((heartbeats.join(), heartbeats.join()));
        heartbeats.withdraw(2);
        let progress = |heartbeats: &Heartbeats| {
            heartbeats.all_answered();
            heartbeats.have_answered()
        };
        assert!(!progress(&heartbeats), "the one that was started is");
        started.answer.store(*heartbeats.ask.borrow(), Ordering::Relaxed);
        assert!(heartbeats.have_answered());
    }

    #[tokio::test]
    async fn who_has_just_come_when_the_drain_closes_is_heard_and_who_was_answered_is_let_go() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let drain = Drain::new();
        let metrics = Metrics::new();
        let serve = |io| {
            let service = service_fn(|_: Request<Incoming>| ready(Ok(Response::new(String::from("heard")))));
            let buffers = BufferAccount::new(Arc::new(BufferLimit::new(8)), Client::V4(1));
            let activity = IdleConnections::new().activity();
            connection(io, SlowPathOnly(service), drain.watch(), &metrics, buffers, activity)
        };
        let ask = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
        let (mut new, theirs) = tokio::io::duplex(1024);
        let (mut old, others) = tokio::io::duplex(1024);
        let clients = async {
            old.write_all(ask).await.unwrap();
            let mut answer = [0; 1024];
            assert!(old.read(&mut answer).await.unwrap() > 0);
            drain.0.send_replace(Phase::Closing);
            assert_eq!(old.read(&mut answer).await.unwrap(), 0, "it is let go");
            new.write_all(ask).await.unwrap();
            let length = new.read(&mut answer).await.unwrap();
            assert!(answer[..length].ends_with(b"heard"));
            drop(new);
        };
        tokio::join!(clients, serve(theirs), serve(others));
    }

    #[test]
    fn slots_seat_up_to_the_limit_and_the_rest_is_a_crowd_that_takes_none() {
        let slots = ConnectionLimit::new(2, OVER_LIMIT);
        let class = || slots.class(false, true);
        assert_eq!(
            [class(), class(), class(), class()],
            [
                ConnectionClass::Normal,
                ConnectionClass::Normal,
                ConnectionClass::OverLimit,
                ConnectionClass::OverLimit
            ]
        );
        assert_eq!(slots.class(true, true), ConnectionClass::OverClientLimit);
        slots.leave(ConnectionClass::Normal);
        assert_eq!(
            [class(), class()],
            [ConnectionClass::Normal, ConnectionClass::OverLimit],
            "whatever the crowd is"
        );
        for class in [
            ConnectionClass::OverLimit,
            ConnectionClass::OverLimit,
            ConnectionClass::OverLimit,
            ConnectionClass::OverClientLimit,
            ConnectionClass::Normal,
        ] {
            slots.leave(class);
        }
        assert_eq!([class(), class()], [ConnectionClass::Normal, ConnectionClass::OverLimit]);
        slots.leave(ConnectionClass::Normal);
        slots.leave(ConnectionClass::OverLimit);
        assert!(!slots.are_empty());
        slots.leave(ConnectionClass::Normal);
        assert!(slots.are_empty());
    }

    /// Gives back a seat when it is dropped.
    struct Seated(Arc<ConnectionLimit>, ConnectionClass);

    impl Drop for Seated {
        fn drop(&mut self) {
            self.0.leave(self.1);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_of_a_full_crowd_goes_for_who_comes_and_nobody_with_a_slot() {
        let slots = Arc::new(ConnectionLimit::new(2, OVER_LIMIT));
        let sit = || {
            let seated = Seated(Arc::clone(&slots), slots.class(false, true));
            let is_regular = seated.1 == ConnectionClass::Normal;
            let task = tokio::spawn(async move {
                let _seated = seated;
                std::future::pending::<()>().await;
            });
            if !is_regular {
                slots.register(task.abort_handle());
            }
            task
        };
        let metrics = Metrics::new();
        let ready = || timeout(OVER_LIMIT_TIMEOUT, slots.ready(&metrics));
        let tasks: Vec<_> = (0..2 + OVER_LIMIT).map(|_| sit()).collect();
        let start = Instant::now();
        ready().await.expect("room");
        assert_eq!(start.elapsed(), EVICTION_GRACE, "it has a little time to say what it wants");
        let gone = || tasks.iter().map(tokio::task::JoinHandle::is_finished).collect::<Vec<_>>();
        assert_eq!(gone()[..4], [false, false, true, false]);
        // The others had as much.
        for count in 1..=3 * OVER_LIMIT {
            sit();
            ready().await.expect("room");
            assert_eq!(
                start.elapsed(),
                EVICTION_GRACE * u32::try_from(1 + count / OVER_LIMIT).unwrap(),
                "{count}"
            );
        }
        assert_eq!(gone().iter().filter(|is_gone| !**is_gone).count(), 2);
        assert!(slots.crowd().len() < 4 * OVER_LIMIT, "those that are gone are not kept");
    }
}
