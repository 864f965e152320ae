//! Worker threads, each with a runtime and accept loops of its own: a connection stays where it was accepted.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use tokio::runtime::{self, Runtime};
use tokio::sync::oneshot;
use tracing::{error, warn};

use super::error::{RunError, TASK_LIMITS};
use crate::server::accept;
use crate::server::accepted::Accepted;
use crate::server::context::ServerContext;
use crate::server::drain::Drain;
use crate::server::heartbeat::{Heartbeat, Heartbeats};
use crate::server::listener::Listener;
use crate::server::memory;

/// How many tasks a thread polls before it checks for new connections and new requests; tokio's default is 61. One poll
/// of a connection may take 0.3 ms.
const TURNS_MAX: u32 = 16;

/// How many tasks are left free where the limit of tasks allows fewer workers than the setting: `systemctl reload` and the
/// health checks of a container run under the same limit.
const SPARE_TASKS: usize = 4;

/// A runtime for the calling thread.
///
/// # Errors
/// When it lacks descriptors.
pub(super) fn runtime() -> Result<Runtime, RunError> {
    runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .event_interval(TURNS_MAX)
        .build()
        .map_err(|error| RunError::System("failed to make a runtime", error))
}

/// The running workers; at least one.
pub(super) struct Workers {
    threads: Vec<JoinHandle<()>>,
    finished: Vec<oneshot::Receiver<Infallible>>,
}

impl Workers {
    /// Starts up to `count` workers on copies of `listeners`, each with a connection handler of its own: fewer, with a
    /// warning, where the limit of tasks allows no more.
    ///
    /// # Errors
    /// When no worker can be started.
    pub(super) fn start<H: Fn(Accepted) + Clone + Send + 'static>(
        count: usize,
        listeners: Vec<Listener>,
        new_handler: impl Fn() -> H,
        context: &ServerContext,
        drain: &Drain,
        heartbeats: &mut Heartbeats,
    ) -> Result<Self, RunError> {
        let mut waiting = Vec::with_capacity(count);
        while waiting.len() < count {
            let own = listeners.iter().map(|each| Ok((each.try_clone()?, heartbeats.register())));
            let own = own
                .collect::<io::Result<Vec<_>>>()
                .map_err(|error| RunError::System("failed to share a listener", error))?;
            match WaitingWorker::spawn(runtime()?, own, new_handler(), context.clone(), drain) {
                Ok(worker) => waiting.push(worker),
                Err(error) if waiting.is_empty() => return Err(RunError::Thread("worker", error)),
                Err(error) => {
                    let started = waiting.len().saturating_sub(SPARE_TASKS).max(1);
                    heartbeats.unregister_last(listeners.len() * (waiting.len() - started + 1));
                    waiting.truncate(started);
                    warn!(
                        asked = count,
                        started,
                        %error,
                        "fewer workers are started than asked for: {TASK_LIMITS} allows no more"
                    );
                    break;
                }
            }
        }
        drop(listeners); // the workers have copies, and close them when the drain begins
        let (threads, finished) = waiting.into_iter().map(WaitingWorker::begin).unzip();
        Ok(Self { threads, finished })
    }

    /// The threads that serve.
    pub(super) fn threads(&self) -> &[JoinHandle<()>] {
        &self.threads
    }

    /// Returns when every worker has dropped its last connection.
    pub(super) async fn finished(&mut self) {
        for worker in &mut self.finished {
            if !worker.is_terminated() {
                let Err(_) = worker.await; // the thread has dropped its end
            }
        }
    }
}

/// A worker whose thread waits to begin. If it is dropped instead, the thread ends.
struct WaitingWorker {
    begin: oneshot::Sender<()>,
    thread: JoinHandle<()>,
    finished: oneshot::Receiver<Infallible>,
}

impl WaitingWorker {
    fn spawn(
        runtime: Runtime,
        listeners: Vec<(Listener, Heartbeat)>,
        handler: impl Fn(Accepted) + Clone + Send + 'static,
        context: ServerContext,
        drain: &Drain,
    ) -> io::Result<Self> {
        let phase = drain.subscribe();
        let (begin, may_begin) = oneshot::channel();
        let (is_finished, finished) = oneshot::channel();
        let worker = Worker { runtime, _is_finished: is_finished };
        let thread = thread::Builder::new().name("worker".into()).spawn(move || {
            if may_begin.blocking_recv().is_err() {
                return;
            }
            let limit = Arc::clone(&context.connection_limit);
            worker.runtime.spawn(async move { memory::trim_after_bursts(&limit).await });
            if let Err(error) = worker.runtime.block_on(accept::serve(listeners, handler, context, phase)) {
                error!(%error, "a worker failed to listen");
            }
            drop(worker);
        })?;
        Ok(Self { begin, thread, finished })
    }

    fn begin(self) -> (JoinHandle<()>, oneshot::Receiver<Infallible>) {
        let _ = self.begin.send(()); // the thread waits for it
        (self.thread, self.finished)
    }
}

/// What a worker's thread owns. Rust drops the fields in this order, also in a panic: the connections that are left after an
/// abort close, each with its audit record, before the worker counts as finished.
struct Worker {
    runtime: Runtime,
    _is_finished: oneshot::Sender<Infallible>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;
    use std::sync::mpsc;
    use tokio::sync::oneshot::error::TryRecvError;

    /// Stands in for a connection: when it is dropped, it reports whether its worker still counted as running.
    struct Connection(oneshot::Receiver<Infallible>, mpsc::Sender<bool>);

    impl Drop for Connection {
        fn drop(&mut self) {
            self.1.send(self.0.try_recv() == Err(TryRecvError::Empty)).unwrap();
        }
    }

    #[test]
    fn connections_close_before_their_worker_counts_as_finished() {
        let (is_finished, finished) = oneshot::channel();
        let (sender, was_running) = mpsc::channel();
        let worker = Worker { runtime: runtime().unwrap(), _is_finished: is_finished };
        let connection = Connection(finished, sender);
        worker.runtime.spawn(async move {
            let _connection = connection;
            pending::<()>().await;
        });
        drop(worker);
        assert_eq!(was_running.recv(), Ok(true));
    }
}
