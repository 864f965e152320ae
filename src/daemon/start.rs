//! Starts everything that serves: the application state, the workers, and the accept loops of the control thread.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::certificate;
use super::error::RunError;
use super::hint::startup_hint;
use super::listeners::Bound;
use super::reload::Reloader;
use super::resources::{self, ConnectionBudget};
use super::signals::Signals;
use super::worker::{self, Workers};
use crate::access::authorization::Authorizer;
use crate::config::watch::WatchedFiles;
use crate::config::{Config, Sources};
use crate::http::health::Health;
use crate::http::routes::Routes;
use crate::http::service::{ConnectionService, HttpService};
use crate::http::state::AppState;
use crate::keys::generator::{Generator, GeneratorError};
use crate::server::accept;
use crate::server::accepted::Accepted;
use crate::server::client_limit::ClientConnectionLimit;
use crate::server::connection;
use crate::server::connection_limit::ConnectionLimit;
use crate::server::context::ServerContext;
use crate::server::drain::Drain;
use crate::server::heartbeat::Heartbeats;
use crate::server::listener::Listener;
use crate::server::proxy_protocol::{ProxyProtocol, read_proxy_headers};
use crate::server::timeouts::Timeouts;
use crate::server::tls::handshake::Tls;
use crate::systemd::credentials::CredentialServer;
use crate::systemd::notify::{Notifier, Readiness};
use crate::telemetry::log::Log;
use crate::telemetry::metrics::Metrics;

/// How many of the connections for metrics one client address may have.
const METRICS_CONNECTIONS_PER_CLIENT: u32 = 16;

/// A service that is ready. It borrows the log, so the log can't end while it exists. Only
/// [`shut_down`](super::shutdown::shut_down) takes it apart, once every connection is closed.
pub(super) struct Started<'a> {
    /// The runtime of the control thread.
    pub(super) control: Runtime,
    pub(super) service: Service<'a>,
}

/// The parts of a service that is ready.
pub(super) struct Service<'a> {
    pub(super) app: Arc<AppState>,
    pub(super) contexts: Contexts,
    pub(super) ports: Vec<u16>,
    pub(super) drain: Drain,
    pub(super) heartbeats: Heartbeats,
    pub(super) signals: Signals,
    pub(super) notifier: Notifier,
    pub(super) readiness: Readiness,
    pub(super) workers: Workers,
    /// For metrics and for credentials, on the control thread.
    pub(super) accept_loops: [JoinHandle<io::Result<()>>; 2],
    pub(super) reloader: Reloader<'a>,
    /// Where the service listens, as the service manager shows it.
    pub(super) status: String,
    /// Whether the service manager starts the service again for the next client.
    pub(super) is_activated: bool,
}

impl<'a> Started<'a> {
    /// Serves on the `bound` listeners, and reports to the service manager that the service is ready.
    ///
    /// # Errors
    /// The service could not start. No connection was accepted.
    pub(super) fn start(
        config: Config,
        sources: &'a Sources,
        files: WatchedFiles,
        bound: Bound,
        generator: &Arc<Generator>,
        log: &'a Log,
    ) -> Result<Self, RunError> {
        let (status, ports, exposed) = (bound.status(), bound.ports(), bound.exposed_addresses());
        let hint = log.is_on_terminal().then(|| startup_hint(&config, &bound));
        let worker_count = resources::worker_count(config.workers);
        let budget = ConnectionBudget::within_open_files(config.max_connections, worker_count)?;
        let app = app_state(&config, generator, log)?;
        app.metrics.connections_limit.set(i64::try_from(budget.keys).unwrap_or(i64::MAX));
        let tls = start_tls(&config, &app.metrics)?;
        let contexts = Contexts::new(&config, &budget, &app.metrics, tls.clone());
        let credential_server = Arc::new(CredentialServer::new(Arc::clone(&app), config.credentials.clone()));
        let (drain, mut heartbeats) = (Drain::new(), Heartbeats::new());

        let control = worker::runtime()?;
        let entered = control.enter();
        let signals = Signals::catch().map_err(|error| RunError::System("failed to catch signals", error))?;
        // Started before the workers, which may use up the limit of tasks.
        let notifier = Notifier::start().map_err(|error| RunError::Thread("notify", error))?;
        let routes = if config.shares_port() { Routes::Both } else { Routes::Client };
        let protocol = proxy_protocol(&config, &app.metrics);
        let handler = || read_proxy_headers(protocol.clone(), serve_http(routes, &app));
        let workers =
            Workers::start(worker_count, bound.keys, handler, &contexts.keys, &drain, &mut heartbeats)?;
        let metrics = serve_http(Routes::Operator, &app);
        let accept_loops = [
            spawn_accept(bound.metrics, metrics, &contexts.metrics, &drain, &mut heartbeats),
            spawn_accept(
                bound.credentials,
                credential_server.handler(),
                &contexts.credentials,
                &drain,
                &mut heartbeats,
            ),
        ];
        drop(entered);

        let service = Service {
            readiness: Readiness::new(generator, workers.threads()),
            reloader: Reloader { config, sources, files, app: Arc::clone(&app), credential_server, tls, log },
            is_activated: bound.is_activated,
            app,
            contexts,
            ports,
            drain,
            heartbeats,
            signals,
            notifier,
            workers,
            accept_loops,
            status,
        };
        service.report_ready(&exposed);
        hint.into_iter().for_each(|hint| log.print_on_terminal(hint));
        Ok(Self { control, service })
    }
}

impl Service<'_> {
    fn report_ready(&self, exposed: &[String]) {
        self.notifier.ready(self.readiness, &self.status);
        info!(version = env!("CARGO_PKG_VERSION"), "ready: {}", self.status);
        self.reloader.log_tokens();
        let config = &self.reloader.config;
        if config.tokens_file.is_none() && config.tls_cert.is_none() && !exposed.is_empty() {
            warn!(
                addresses = exposed.join(", "),
                "keys are served to every client that reaches these addresses, without TLS and without a token: set \
                 tokens-file or tls-cert, or listen on loopback or a Unix socket"
            );
        }
    }
}

/// The limits and timeouts for the connections of each role.
pub(super) struct Contexts {
    pub(super) keys: ServerContext,
    metrics: ServerContext,
    pub(super) credentials: ServerContext,
}

impl Contexts {
    fn new(
        config: &Config,
        budget: &ConnectionBudget,
        metrics: &Arc<Metrics>,
        tls: Option<Arc<Tls>>,
    ) -> Self {
        let context = |connections, over_limit| {
            let limit = ConnectionLimit::new(connections, over_limit);
            let timeouts = Timeouts::new(config.head_timeout, config.idle_timeout, config.write_timeout);
            ServerContext::new(limit, timeouts, Arc::clone(metrics))
        };
        let client_limit = |limit| Arc::new(ClientConnectionLimit::new(limit, config.proxies()));
        Self {
            keys: context(budget.keys, budget.over_limit)
                .with_gauge(metrics.connections.clone())
                .with_client_limit(config.max_connections_per_client.map(client_limit))
                .with_proxy_protocol(config.proxy_protocol)
                .with_tls(tls),
            metrics: context(budget.metrics, budget.metrics)
                .with_client_limit(Some(client_limit(METRICS_CONNECTIONS_PER_CLIENT))),
            credentials: context(budget.credentials, budget.credentials),
        }
    }

    pub(super) fn all(&self) -> [&ServerContext; 3] {
        [&self.keys, &self.metrics, &self.credentials]
    }

    /// The number of connections, whatever their class.
    pub(super) fn open_connections(&self) -> usize {
        self.all().iter().map(|context| context.connection_limit.open_connections()).sum()
    }
}

fn app_state(
    config: &Config,
    generator: &Arc<Generator>,
    log: &Log,
) -> Result<Arc<AppState>, GeneratorError> {
    Ok(Arc::new(AppState {
        max_size: AtomicU64::new(config.max_size),
        generator: Arc::clone(generator),
        health: Arc::new(Health::new(Arc::clone(generator))),
        metrics: Arc::new(Metrics::new()),
        authorizer: Authorizer::new(config.rules(), config.max_bulk_streams, generator)?,
        dropped: log.dropped(),
        has_page: config.page,
    }))
}

fn start_tls(config: &Config, metrics: &Metrics) -> Result<Option<Arc<Tls>>, RunError> {
    let Some(settings) = config.tls() else { return Ok(None) };
    let (tls, identity) = Tls::new(settings, metrics.tls()).map_err(RunError::Tls)?;
    certificate::log_loaded("keys are served over TLS", &identity);
    Ok(Some(Arc::new(tls)))
}

fn proxy_protocol(config: &Config, metrics: &Metrics) -> Option<Arc<ProxyProtocol>> {
    let protocol = || ProxyProtocol::new(config.proxies(), metrics.proxy_protocol());
    config.proxy_protocol.then(|| Arc::new(protocol()))
}

/// Serves `routes` over HTTP on each connection.
fn serve_http(routes: Routes, app: &Arc<AppState>) -> impl Fn(Accepted) + Clone + Send + 'static + use<> {
    let service = HttpService::new(routes, Arc::clone(app));
    connection::http_handler(move |class, peer| -> ConnectionService { service.clone().serve(class, peer) })
}

/// Accepts connections on the control thread.
fn spawn_accept(
    listeners: Vec<Listener>,
    handler: impl Fn(Accepted) + Clone + Send + 'static,
    context: &ServerContext,
    drain: &Drain,
    heartbeats: &mut Heartbeats,
) -> JoinHandle<io::Result<()>> {
    let listeners = listeners.into_iter().map(|listener| (listener, heartbeats.register())).collect();
    tokio::spawn(accept::serve(listeners, handler, context.clone(), drain.subscribe()))
}
