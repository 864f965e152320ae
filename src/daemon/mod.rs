//! The daemon: start, supervise, shut down.

pub mod signals;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::{self, Runtime};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::{info, warn};

use self::signals::{SignalAction, Signals};
use crate::access::authorization::Authorizer;
use crate::access::tokens_file;
use crate::config::watch::WatchedFiles;
use crate::config::{self, Config, Sources};
use crate::http::health::Health;
use crate::http::routes::Routes;
use crate::http::service::{ConnectionService, HttpService};
use crate::http::state::AppState;
use crate::keys::generator::{Generator, GeneratorError, Source};
use crate::server::accept;
use crate::server::accepted::Accepted;
use crate::server::activation::ActivatedSockets;
use crate::server::client_limit::ClientConnectionLimit;
use crate::server::connection;
use crate::server::connection_limit::{ConnectionLimit, OVER_LIMIT_CONNECTIONS};
use crate::server::context::ServerContext;
use crate::server::drain::{Drain, Phase};
use crate::server::heartbeat::{Heartbeat, Heartbeats};
use crate::server::listener::{ListenError, Listener};
use crate::server::memory;
use crate::server::proxy_protocol::{self, ProxyProtocol};
use crate::server::timeouts::Timeouts;
use crate::server::tls::handshake::Tls;
use crate::server::tls::identity::{LoadError, LoadedIdentity, TlsFile};
use crate::server::tls::reload::ReloadError;
use crate::server::tls::settings::TlsSettings;
use crate::systemd::credentials::{self, CredentialServer};
use crate::systemd::notify::{self, Notifier};
use crate::systemd::reload;
use crate::telemetry::log::Log;
use crate::telemetry::metrics::Metrics;

/// Connections that the metrics listener serves at once: scrapers and probes are few. Over this limit as many more get
/// one response each.
const METRICS_CONNECTIONS: usize = 64;

/// How many of them one client address may have.
const METRICS_CONNECTIONS_PER_CLIENT: u32 = 16;

/// How many turns of connections a thread takes before it looks for new ones and for new requests. A turn may be 0.3 ms of
/// work, and tokio takes 61 of them by default.
const TURNS_MAX: u32 = 16;

/// Descriptors that the process needs beside connections: files, sockets of log and service manager, and the control
/// thread's runtime.
const OWN_DESCRIPTORS: u64 = 32;

/// Those of a worker: its runtime's and its listeners.
const WORKER_DESCRIPTORS: u64 = 4;

/// Fewer are not tried with: what a start takes is about 20, and tokio panics where it lacks them.
const DESCRIPTORS_MIN: u64 = 32;

/// What limits how many threads there may be.
const TASK_LIMITS: &str = "the limit of tasks (TasksMax=, a container's pids limit, ulimit -u)";

/// How many tasks are left to others where the limit of tasks allows fewer workers than asked for: under the same limit run
/// `systemctl reload`, and the health checks of a container.
const SPARE_TASKS: usize = 4;

/// How long the end waits for workers to drop their connections: one that is blocked must not hold it.
const ABORT: Duration = Duration::from_millis(1500);

/// Why the service could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The random generator failed its tests.
    #[error("no keys can be made: {0}")]
    Generator(#[from] GeneratorError),
    /// There is no listener.
    #[error("{0}")]
    Listen(#[from] ListenError),
    /// There is none, and the service manager passed no socket for it.
    #[error(
        "no socket was passed by {0}: run `systemctl start {0}`, or where it is active look at `systemctl status {0}` ({1})"
    )]
    NotPassed(&'static str, ListenError),
    /// So few files may be open.
    #[error("expected a limit of at least {DESCRIPTORS_MIN} open files (LimitNOFILE=, ulimit -n), found {0}")]
    Descriptors(u64),
    /// Certificates and key are no longer what they were when the configuration was read.
    #[error("no TLS can be spoken: {}", sentences(.0))]
    Tls(Vec<LoadError>),
    /// A thread that the service can't do without.
    #[error("expected room for the {0} thread within {TASK_LIMITS}, found: {1}")]
    Thread(&'static str, io::Error),
    /// The system denied something that has no other name.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
}

/// Serves until a signal says to stop, and returns when the last connection is gone or the drain's time is over.
///
/// `config` is what `sources` gave, from `files`; they are read again on SIGHUP, and when a file has changed.
///
/// # Errors
/// What kept the service from starting; nothing has been served then.
pub fn run(
    config: Config,
    sources: &Sources,
    mut files: WatchedFiles,
    inherited: ActivatedSockets,
    source: impl Source,
    log: &Log,
) -> Result<(), RunError> {
    let generator = Arc::new(Generator::new(source)?);
    let Listeners { keys, metrics: operator, credentials, is_activated } = listeners(&config, inherited)?;
    let ports: Vec<u16> = keys.iter().chain(&operator).filter_map(Listener::port).collect();
    let cpus = thread::available_parallelism().map_or(1, Into::into);
    let workers_count = worker_count(config.workers, cpus);
    let descriptors = raise_descriptors()?;
    let limits = ConnectionLimits::fit(descriptors, config.max_connections, workers_count);
    if limits.keys < config.max_connections {
        warn!(
            asked = config.max_connections,
            granted = limits.keys,
            "max-connections is lowered to what the limit of open files allows (LimitNOFILE=, ulimit -n)"
        );
    }
    let metrics = Arc::new(Metrics::new());
    metrics.connections_limit.set(i64::try_from(limits.keys).unwrap_or(i64::MAX));
    let health = Arc::new(Health::new(Arc::clone(&generator)));
    let api = Arc::new(AppState {
        max_size: AtomicU64::new(config.max_size),
        generator: Arc::clone(&generator),
        health: Arc::clone(&health),
        metrics: Arc::clone(&metrics),
        authorizer: Authorizer::new(config.rules(), config.max_bulk_streams),
        dropped: log.dropped(),
        has_page: config.page,
    });
    let tls = match config.tls.clone() {
        None => None,
        Some(settings) => {
            let (tls, loaded) = Tls::new(settings, metrics.tls()).map_err(RunError::Tls)?;
            report("keys are served over TLS", &loaded);
            Some(Arc::new(tls))
        }
    };
    let proxy_protocol = config
        .proxy_protocol
        .then(|| Arc::new(ProxyProtocol::new(config.proxies.clone(), metrics.proxy_protocol())));
    let status = status(&keys, &credentials, &operator, config.shares_port());
    let exposed = exposed_addresses(&config, &keys);
    let credential_server = Arc::new(CredentialServer::new(Arc::clone(&api), config.credentials.clone()));

    let context = |connections, over_limit| {
        let slots = ConnectionLimit::new(connections, over_limit);
        let timeouts = Timeouts::new(config.head_timeout, config.idle_timeout, config.write_timeout);
        ServerContext::new(slots, timeouts, Arc::clone(&metrics))
    };
    let client_limit = |limit| Some(Arc::new(ClientConnectionLimit::new(limit, config.proxies.clone())));
    let key_terms = context(limits.keys, limits.over_limit)
        .with_gauge(metrics.connections.clone())
        .with_client_limit(config.max_connections_per_client.and_then(client_limit))
        .with_proxy_protocol(config.proxy_protocol)
        .with_tls(tls.clone());
    let operator_terms = context(limits.metrics, limits.metrics)
        .with_client_limit(client_limit(METRICS_CONNECTIONS_PER_CLIENT));
    let credential_terms = context(limits.credentials, limits.credentials);
    let routes = if config.shares_port() { Routes::Both } else { Routes::Client };
    let drain = Drain::new();
    let mut heartbeats = Heartbeats::new();

    let control = runtime()?;
    let mut signals = control
        .block_on(async { Signals::catch() })
        .map_err(|error| RunError::System("signals can't be caught", error))?;
    // Before the workers, which may take all the threads that there may be.
    let notifier = Notifier::start().map_err(|error| RunError::Thread("notify", error))?;
    let mut workers = Vec::new();
    for _ in 0..workers_count {
        let listeners = share(&keys, &mut heartbeats)
            .map_err(|error| RunError::System("a listener can't be shared", error))?;
        let site = HttpService::new(routes, Arc::clone(&api));
        let begin = proxy_protocol::read_proxy_headers(proxy_protocol.clone(), seated(site));
        match Worker::start(runtime()?, listeners, begin, key_terms.clone(), &drain) {
            Ok(worker) => workers.push(worker),
            Err(error) if workers.is_empty() => return Err(RunError::Thread("worker", error)),
            Err(error) => {
                let started = workers.len().saturating_sub(SPARE_TASKS).max(1);
                heartbeats.unregister_last(keys.len() * (workers.len() - started + 1));
                workers.truncate(started); // the others have not begun
                warn!(
                    asked = workers_count,
                    started,
                    %error,
                    "fewer workers are started than asked for: {TASK_LIMITS} allows no more"
                );
                break;
            }
        }
    }
    drop(keys);
    workers.iter_mut().for_each(Worker::begin);

    let context = [&key_terms, &operator_terms, &credential_terms];
    let is_drained = control.block_on(async {
        let listeners = operator.into_iter().map(|listener| (listener, heartbeats.register())).collect();
        let site = HttpService::new(Routes::Operator, Arc::clone(&api));
        let operators =
            tokio::spawn(accept::serve(listeners, seated(site), operator_terms.clone(), drain.subscribe()));
        let listeners = credentials.into_iter().map(|listener| (listener, heartbeats.register())).collect();
        let units =
            tokio::spawn(accept::serve(listeners, credential_server.service(), credential_terms.clone(), drain.subscribe()));

        notifier.ready(&status);
        info!(version = env!("CARGO_PKG_VERSION"), "{status}");
        say_tokens(&config);
        if !exposed.is_empty() {
            warn!(
                addresses = exposed.join(", "),
                "keys are served to every client that reaches these addresses, without TLS and without a token: set \
                 tokens-file or tls-cert, or listen on loopback or a Unix socket"
            );
        }

        let alive = || {
            // A generator that fails is reported, with no request needed, and the watchdog is answered all the same:
            // systemd would hide the failure from the operator by a restart.
            let _ = generator.check();
            api.report_failure();
            let progress = heartbeats.next_round().then_some(()).ok_or("a worker gave no sign of life");
            health.set_stalled(progress.is_err());
            metrics.workers_healthy.set(i64::from(progress.is_ok()));
            progress
        };
        let idle = async {
            match config.exit_idle {
                Some(period) if is_activated => {
                    ConnectionLimit::idle_for(&[&key_terms.connection_limit, &credential_terms.connection_limit], period).await;
                    if generator.failure().is_some() {
                        // The next connection would start a process that knows nothing of the failure.
                        warn!("exit-idle is ignored: the random generator has failed");
                        std::future::pending::<()>().await;
                    }
                }
                _ => std::future::pending().await,
            }
        };
        let mut running = config.clone();
        let mut reloads = 0;
        let reload = Reload { sources, api: &api, credential_server: &credential_server, tls: tls.as_deref(), log };
        let reason = {
            let mut watchdog = std::pin::pin!(notify::watchdog(&notifier, || heartbeats.all_answered(), alive));
            let mut idle = std::pin::pin!(idle);
            loop {
                tokio::select! {
                    never = &mut watchdog => never,
                    () = &mut idle => break "idle",
                    () = files.changed() => match reload.run(&mut running, &mut files, Cause::Change) {
                        Ok(()) => notifier.status(&status),
                        Err(Refused(why)) => {
                            notifier.status(&format!("{status}; the last reload was refused: {why}"));
                        }
                    },
                    order = signals.next() => match order {
                        SignalAction::Stop(signal) => break signal,
                        SignalAction::Reload => {
                            notifier.reloading();
                            reloads += 1;
                            let outcome = reload.run(&mut running, &mut files, Cause::Signal);
                            let refused = outcome.err().map(|Refused(why)| why);
                            notifier.ready(&format!("{status}{}", reload::ReloadOutcome { number: reloads, refused }));
                        }
                    },
                }
            }
        };

        info!(reason, "stopping");
        health.start_draining();
        notifier.stopping("Draining");
        let (drain_delay, drain_timeout) = (running.drain_delay, running.drain_timeout);
        let drained = async {
            tokio::time::sleep(drain_delay).await;
            health.start_stopping();
            drain.begin(&context).await;
            let all_gone = async {
                all_finished(&mut workers).await;
                // Each ends with its last connection; a panic there has been logged.
                let _ = operators.await;
                let _ = units.await;
                drain.wait_until_acknowledged(&context, &ports).await;
            };
            timeout(drain_timeout, all_gone).await.is_ok()
        };
        // A token that is removed meanwhile must not open anything for as long as the drain takes.
        let reloading = async {
            loop {
                files.changed().await;
                let _ = reload.run(&mut running, &mut files, Cause::Change);
            }
        };
        let connections = &metrics.connections;
        tokio::select! {
            biased;
            signal = signals.stop() => {
                warn!(signal, connections = connections.get(), "a second signal ends the drain: open connections are reset");
            }
            never = reloading => never,
            is_drained = drained => {
                if is_drained {
                    info!("stopped");
                    return true;
                }
                let unacknowledged = drain.close_acknowledged(&context, &ports);
                warn!(connections = connections.get(), unacknowledged, "stopped with connections still open");
            }
        }
        log.wait_for_room();
        drain.abort(&context);
        if timeout(ABORT, all_finished(&mut workers)).await.is_err() {
            warn!("a worker does not stop: connections and audit records of its own are lost");
        }
        false
    });
    // With what is left of its connections, as the workers' runtimes went with theirs.
    control.shutdown_background();
    if !is_drained {
        drain.reset_ended(&context, &ports);
    }
    let lost = log.dropped().audit_records();
    if lost > 0 {
        warn!(lost, "audit records were dropped since the start: the log did not take them in time");
    }
    Ok(())
}

struct Listeners {
    keys: Vec<Listener>,
    metrics: Vec<Listener>,
    /// Only ever inherited: without systemd there is no unit to load one.
    credentials: Vec<Listener>,
    /// Whether the service manager starts the service again for the next client. Not for keys on a socket that was bound here.
    is_activated: bool,
}

/// What was inherited, and the rest bound. Where that is forbidden, as in the sandbox of the shipped unit, a socket that is
/// missing has been switched off by an administrator: the others are served.
fn listeners(config: &Config, inherited: ActivatedSockets) -> Result<Listeners, RunError> {
    let has_any =
        !(inherited.http.is_empty() && inherited.metrics.is_empty() && inherited.credential.is_empty());
    let bind = |host, port, settings: [&'static str; 2], unit: &'static str, lost: &str| {
        let bound = Listener::bind(host, port, config.unix_mode);
        match bound.map_err(|error| error.with_settings(settings[0], settings[1])) {
            Ok(listener) => Ok(Some(listener)),
            Err(error) if has_any && error.is_forbidden() => {
                warn!(%error, "{lost}: {unit} passed no socket, and the sandbox lets none be made");
                Ok(None)
            }
            Err(error) if notify::is_invoker() && error.is_denied() => Err(RunError::NotPassed(unit, error)),
            Err(error) => Err(error.into()),
        }
    };
    let mut is_activated = has_any;
    let mut keys = inherited.http;
    if keys.is_empty() {
        let (host, port, unit) = (&config.host, config.srv_port, "key-service.socket");
        keys.extend(bind(host, port, ["host", "srv-port"], unit, "no keys are served over HTTP")?);
        is_activated &= keys.is_empty();
    }
    let mut metrics = inherited.metrics;
    if metrics.is_empty() && !config.shares_port() {
        let (host, port, unit) = (&config.metrics_host, config.metrics_port, "key-service-metrics.socket");
        metrics.extend(bind(host, port, ["metrics-host", "metrics-port"], unit, "no metrics are served")?);
    }
    Ok(Listeners { keys, metrics, credentials: inherited.credential, is_activated })
}

/// Where the service listens, for people and for tests.
fn status(keys: &[Listener], credentials: &[Listener], metrics: &[Listener], shares_port: bool) -> String {
    let list =
        |listeners: &[Listener]| listeners.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let metrics = match metrics {
        [] if shares_port && !keys.is_empty() => "metrics on the same".to_owned(),
        [] => "no metrics".to_owned(),
        listeners => format!("metrics on {}", list(listeners)),
    };
    let credentials = match credentials {
        [] => String::new(),
        listeners => format!("; credentials on {}", list(listeners)),
    };
    let keys = match keys {
        [] => "No keys over HTTP".to_owned(),
        listeners => format!("Keys on {}", list(listeners)),
    };
    format!("{keys}{credentials}; {metrics}")
}

/// Raises the soft limit of open files to the hard one, and returns it; `None` is no limit.
fn raise_descriptors() -> Result<Option<u64>, RunError> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let descriptors = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    match descriptors {
        Some(few) if few < DESCRIPTORS_MIN => Err(RunError::Descriptors(few)),
        descriptors => Ok(descriptors),
    }
}

/// How many connections each role may have, so that all of them together, those over a limit included, and the process
/// itself have a descriptor each.
#[derive(Debug, PartialEq, Eq)]
struct ConnectionLimits {
    keys: usize,
    /// More connections for keys, which get no slot.
    over_limit: usize,
    /// For metrics; as many more get no slot.
    metrics: usize,
    /// For credentials; as many more get no slot.
    credentials: usize,
}

impl ConnectionLimits {
    fn fit(descriptors: Option<u64>, keys: usize, workers: usize) -> Self {
        let wanted = Self {
            keys,
            over_limit: OVER_LIMIT_CONNECTIONS,
            metrics: METRICS_CONNECTIONS,
            credentials: credentials::CONNECTIONS,
        };
        let Some(descriptors) = descriptors else { return wanted };
        let own = OWN_DESCRIPTORS + WORKER_DESCRIPTORS * workers as u64;
        let free = usize::try_from(descriptors - own.min(descriptors / 2)).unwrap_or(usize::MAX);
        // Where there are few, half of them are for keys.
        let over_limit = wanted.over_limit.min(free / 8).max(1);
        let metrics = wanted.metrics.min(free / 16).max(1);
        let credentials = wanted.credentials.min(free / 16).max(1);
        let others = over_limit + 2 * metrics + 2 * credentials;
        Self { keys: wanted.keys.min(free.saturating_sub(others)).max(1), over_limit, metrics, credentials }
    }

    #[cfg(test)]
    fn descriptors(&self) -> usize {
        self.keys + self.over_limit + 2 * self.metrics + 2 * self.credentials
    }
}

fn worker_count(asked: usize, cpus: usize) -> usize {
    match asked {
        0 => cpus.min(config::WORKERS_MAX),
        count => count,
    }
}

fn share(listeners: &[Listener], heartbeats: &mut Heartbeats) -> io::Result<Vec<(Listener, Heartbeat)>> {
    listeners.iter().map(|listener| Ok((listener.try_clone()?, heartbeats.register()))).collect()
}

/// The routes over HTTP, for each connection by the seat that it got.
fn seated(site: HttpService) -> impl Fn(Accepted) + Clone + Send + 'static {
    connection::http(move |seat, peer| -> ConnectionService { site.clone().serve(seat, peer) })
}

fn runtime() -> Result<Runtime, RunError> {
    runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .event_interval(TURNS_MAX)
        .build()
        .map_err(|error| RunError::System("a runtime can't be made", error))
}

/// A thread with a runtime and accept loops of its own: a connection stays where it was accepted. Dropped before
/// [`Worker::begin`], it ends.
struct Worker {
    go: Option<oneshot::Sender<()>>,
    done: oneshot::Receiver<()>,
}

impl Worker {
    fn start(
        runtime: Runtime,
        listeners: Vec<(Listener, Heartbeat)>,
        begin: impl Fn(Accepted) + Clone + Send + 'static,
        context: ServerContext,
        drain: &Drain,
    ) -> io::Result<Self> {
        let phase: tokio::sync::watch::Receiver<Phase> = drain.subscribe();
        let (go, may_begin) = oneshot::channel();
        let (done, is_done) = oneshot::channel();
        thread::Builder::new().name("worker".into()).spawn(move || {
            if may_begin.blocking_recv().is_err() {
                return;
            }
            let slots = Arc::clone(&context.connection_limit);
            runtime.spawn(async move { memory::trim_after_bursts(&slots).await });
            if let Err(error) = runtime.block_on(accept::serve(listeners, begin, context, phase)) {
                tracing::error!(%error, "a worker can't listen");
            }
            drop(runtime); // with the connections that are left after an abort, each of which leaves its record
            let _ = done.send(()); // nobody waits once the drain's time is over
        })?;
        Ok(Self { go: Some(go), done: is_done })
    }

    fn begin(&mut self) {
        if let Some(go) = self.go.take() {
            let _ = go.send(()); // the thread waits for it
        }
    }

    async fn finished(&mut self) {
        if !self.done.is_terminated() {
            let _ = (&mut self.done).await; // an error says that the thread is gone, which is what is waited for
        }
    }
}

async fn all_finished(workers: &mut [Worker]) {
    for worker in workers {
        worker.finished().await;
    }
}

/// The key listeners' addresses that are not of this machine alone, where neither tokens nor TLS protect the keys.
fn exposed_addresses(config: &Config, keys: &[Listener]) -> Vec<String> {
    if config.tokens.is_some() || config.tls.is_some() {
        return Vec::new();
    }
    let is_exposed = |listener: &&Listener| match listener {
        Listener::Tcp(listener) => {
            !listener.local_addr().is_ok_and(|address| address.ip().to_canonical().is_loopback())
        }
        Listener::Unix(_) => false,
    };
    keys.iter().filter(is_exposed).map(ToString::to_string).collect()
}

/// Why the configuration is read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// SIGHUP: its sender means what the files say.
    Signal,
    /// A file has changed. It may be half of what somebody is writing.
    Change,
}

/// What a reload reads from, and what it changes.
struct Reload<'a> {
    sources: &'a Sources,
    api: &'a AppState,
    credential_server: &'a CredentialServer,
    tls: Option<&'a Tls>,
    log: &'a Log,
}

impl Reload<'_> {
    /// Takes on what may change while the service runs, and names in the log what may not.
    fn run(&self, running: &mut Config, files: &mut WatchedFiles, cause: Cause) -> Result<(), Refused> {
        let before = std::mem::take(files);
        let loaded = self.sources.reload(running, files);
        // Those in use are watched too, whatever the new configuration names.
        running.files().for_each(|path| files.add(&path));
        let changed = files.changed_since(&before);
        if cause == Cause::Change {
            let changed =
                changed.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
            info!(changed, "files have changed, the configuration is read again");
        }
        let mut reasons: Vec<String> = Vec::new();
        for file in files.deleted() {
            reasons.push(format!(
                "{}: expected a file in a directory, found one that was deleted from it: it never changes again; mount its \
                 directory instead of the file (in Kubernetes without subPath)",
                file.display()
            ));
        }
        match loaded {
            Ok(new) if reasons.is_empty() => {
                let removed = running.removed_by_reload(&new);
                if cause == Cause::Signal || removed.is_empty() {
                    self.apply(running, &new, &removed);
                    return Ok(());
                }
                reasons.push(format!(
                    "{}: a changed file alone removes no protection; reload (SIGHUP) or restart to remove it on purpose",
                    removed.join(", ")
                ));
            }
            Ok(_) => {}
            Err(mistakes) => reasons.extend(mistakes.iter().map(str::to_owned)),
        }
        for mistake in &reasons {
            tracing::error!(mistake, "the new configuration is refused");
        }
        tracing::error!("the configuration stays as it was");
        self.api.metrics.config_last_reload_successful.set(0);
        self.reload_changed_files(running, &changed);
        Err(Refused(reasons.join("; ")))
    }

    /// Puts `new` in force, as far as a restart is not needed.
    fn apply(&self, running: &mut Config, new: &Config, removed: &[&str]) {
        for setting in running.needs_restart(new) {
            warn!(setting, "this setting has changed and takes effect at the next restart");
        }
        if running.loses_tls_at_restart(new) {
            warn!("TLS is no longer configured: it stays in force, and the next restart removes it");
        }
        if !removed.is_empty() {
            warn!(settings = removed.join(", "), "protection removed by this reload");
        }
        if let Some(tls) = self.tls {
            match tls.reload(new.tls.clone()) {
                Ok(loaded) => {
                    report("the certificate is read again", &loaded);
                    if new.tls.is_some() {
                        running.tls.clone_from(&new.tls);
                    }
                }
                // The files were in order a moment ago: what has changed since is noticed within seconds.
                Err(error) => keep_certificate(&error),
            }
        }
        self.api.max_size.store(new.max_size, Ordering::Relaxed);
        self.log.set_level(new.log_level);
        running.apply_reloadable(new);
        self.api.authorizer.replace(running.rules());
        self.credential_server.replace(running.credentials.clone());
        self.api.metrics.config_last_reload_successful.set(1);
        info!(max_size = new.max_size, log_level = %new.log_level, "the configuration is reloaded");
        say_tokens(running);
    }

    /// Reads tokens and certificates in use again if their files have changed, although the configuration as a whole is
    /// refused: an error elsewhere must neither keep a revoked token valid nor let a certificate expire.
    fn reload_changed_files(&self, running: &mut Config, changed: &[&Path]) {
        let has_changed = |path: &PathBuf| changed.contains(&path.as_path());
        let tls_changed = |tls: &TlsSettings| {
            tls.files().filter_map(|file| file.path().ok()).any(|path| has_changed(&path))
        };
        if let Some(tls) = self.tls.filter(|_| running.tls.as_ref().is_some_and(tls_changed)) {
            match tls.reload(None) {
                Ok(loaded) => report(CERTIFICATE_CHANGED, &loaded),
                Err(error) => keep_certificate(&error),
            }
        }
        let Some(tokens) = &mut running.tokens else { return };
        let path = tokens.path().filter(has_changed);
        if let Some(Ok(grants)) = path.map(|path| tokens_file::read(&path)) {
            tokens.grants = grants.into();
            self.api.authorizer.replace(running.rules());
            say_tokens(running);
        }
    }
}

/// What is logged of a certificate that was noticed to have changed.
const CERTIFICATE_CHANGED: &str = "the certificate has changed and is in use";

fn report(what: &'static str, loaded: &LoadedIdentity) {
    info!(not_after = %loaded.not_after(), "{what}");
    if let Some(warning) = loaded.warning() {
        warn!(not_after = %loaded.not_after(), "{warning}");
    }
}

/// Certificate and client CA are judged apart: what is in order of the two is in use.
fn keep_certificate(error: &ReloadError) {
    if let Some(loaded) = &error.applied {
        report(CERTIFICATE_CHANGED, loaded);
    }
    let (client_ca, certificate): (Vec<_>, Vec<_>) =
        error.errors.iter().cloned().partition(|fault| fault.file == TlsFile::ClientCa);
    if !certificate.is_empty() {
        let faults = sentences(&certificate);
        tracing::error!(faults, "the certificate has changed and is refused; the one before stays");
    }
    if !client_ca.is_empty() {
        let faults = sentences(&client_ca);
        tracing::error!(faults, "the client CA has changed and is refused; the one before stays");
    }
}

fn sentences(faults: &[LoadError]) -> String {
    faults.iter().map(|fault| fault.message.as_str()).collect::<Vec<_>>().join("; ")
}

/// Says how many tokens there are, so that a file which was not read shows.
fn say_tokens(config: &Config) {
    if let Some(file) = &config.tokens {
        info!(count = file.grants.len(), file = file.place, "keys are given to bearers of a token only");
    }
}

/// Why the new configuration is refused, which is in the log too.
struct Refused(String);

/// Forbids core dumps for the life of the process: key bytes must not reach a disk.
///
/// A limit of 1 is what the kernel takes as a refusal for dumps to a program too (core(5), piping), where 0 is ignored;
/// for dumps to a file both are below the smallest one. A hard limit of 0 can't be raised, and stays.
///
/// # Errors
/// When the system denies it.
pub fn forbid_core_dumps() -> io::Result<()> {
    let lowest = getrlimit(Resource::Core).maximum.map_or(1, |maximum| maximum.min(1));
    let none = Rlimit { current: Some(lowest), maximum: Some(lowest) };
    Ok(setrlimit(Resource::Core, none)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_says_what_is_not_served() {
        let shown = |shares_port| status(&[], &[], &[], shares_port);
        assert_eq!([shown(false), shown(true)], ["No keys over HTTP; no metrics"; 2]);
    }

    #[test]
    fn all_connections_together_fit_the_limit_of_open_files() {
        for descriptors in [32, 40, 64, 100, 256, 600, 1024, 4096, 16_384] {
            for workers in [1, 2, 64] {
                let limits = ConnectionLimits::fit(Some(descriptors), 10_000, workers);
                let own = (OWN_DESCRIPTORS + WORKER_DESCRIPTORS * workers as u64).min(descriptors / 2);
                assert!(limits.descriptors() as u64 + own <= descriptors, "{descriptors}: {limits:?}");
                assert!(limits.keys as u64 >= descriptors / 8, "{descriptors}: {limits:?}");
            }
        }
        let limits = ConnectionLimits::fit(Some(16_384), 10_000, 2);
        assert_eq!(limits, ConnectionLimits::fit(None, 10_000, 2), "nothing is lowered without need");
    }

    #[test]
    fn the_default_is_a_worker_for_each_cpu_up_to_the_settings_own_maximum() {
        for (asked, cpus, count) in [(0, 2, 2), (0, 256, 256), (0, 1024, 256), (1, 1024, 1), (256, 2, 256)] {
            assert_eq!(worker_count(asked, cpus), count, "{asked} asked for, {cpus} CPUs");
        }
    }
}
