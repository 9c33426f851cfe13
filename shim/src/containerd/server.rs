//! The long-running server: one thread, one reactor, until nothing is left of the pod and containerd says so.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use containerd_shim_protos::ttrpc::r#async::Server;
use log::{info, warn};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::container::Shared;
use crate::containerd::callers;
use crate::containerd::events::Events;
use crate::containerd::sandbox::SandboxService;
use crate::containerd::task::TaskService;
use crate::error::{Error, IoError, Result};
use crate::kernel::exits::Exits;
use crate::pod::{Pod, Stop};

/// The service as the crate has it, and as containerd before 2.0 (and whoever is told version 2) calls it. The messages
/// are the same.
const TASK_V3: &str = "containerd.task.v3.Task";
const TASK_V2: &str = "containerd.task.v2.Task";

/// How long a caller may stay connected when there is nothing left to serve. containerd closes its connection within
/// milliseconds of the answer.
const HANGING_UP: Duration = Duration::from_millis(500);

/// How long the last events and answers may take when the server ends.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What the server is told on its command line.
#[derive(Debug)]
pub struct Settings {
    /// containerd's namespace.
    pub namespace: String,
    /// The path of containerd's ttrpc socket.
    pub events: String,
    /// The path of our own socket.
    pub socket: PathBuf,
}

/// Serves the pod whose first bundle is the working directory. The listening socket is standard input.
///
/// # Errors
/// `Io` when the socket or a signal handler cannot be had.
pub fn serve(settings: Settings) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(Duration::from_secs(1))
        .thread_stack_size(256 * 1024)
        .build()
        .map_err(IoError::at("start the runtime of", "/proc/self"))?;
    let socket = settings.socket.clone();
    let served = runtime.block_on(run(settings));
    if served.is_err() {
        // It never served; where it did, the socket went with the order to stop.
        let _ = std::fs::remove_file(&socket);
    }
    runtime.shutdown_timeout(LAST_WORDS);
    served
}

async fn run(settings: Settings) -> Result<()> {
    let (listener, mut callers) = callers::counted(take_listener()?);
    let first_bundle: Arc<Path> = std::env::current_dir()
        .map_err(IoError::at("read", "the working directory"))?
        .into();
    let exits = Exits::watch()?;
    let (events, published) =
        Events::publish_to(settings.events.clone(), settings.namespace.clone());
    let (ending, mut ended) = watch::channel(false);
    let stop = Arc::new(Stop {
        socket: settings.socket.clone(),
        ending,
    });
    let pod = Arc::new(Pod::new(Shared {
        namespace: settings.namespace.into(),
        first_bundle,
        exits,
        events,
    }));
    let sandbox = create_sandbox(Arc::new(SandboxService {
        pod: pod.clone(),
        stop: stop.clone(),
    }));
    let service = TaskService { pod, stop };
    let v3 = create_task(Arc::new(service.clone()));
    let mut v2 = create_task(Arc::new(service.clone()));
    let v2 = v2
        .remove(TASK_V3)
        .map(|service| [(TASK_V2.to_owned(), service)].into())
        .ok_or(Error::Internal("the Task service has another name"))?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(v3)
        .register_service(v2)
        .register_service(sandbox);
    server
        .start()
        .await
        .map_err(|e| IoError::at("serve at", &settings.socket)(std::io::Error::other(e)))?;
    tokio::spawn(ignore_terminations()?);
    info!("serving at {}", settings.socket.display());
    service.end_if_forgotten();
    // It holds the queue of events open, which the end waits for.
    drop(service);
    // The sender is in the service, which lives as long as the server.
    let _ = ended.wait_for(|ended| *ended).await;
    if tokio::time::timeout(HANGING_UP, callers.gone())
        .await
        .is_err()
    {
        info!("a caller stays connected");
    }
    // What is still asked is answered before the connections close.
    if tokio::time::timeout(LAST_WORDS, server.shutdown())
        .await
        .is_err()
    {
        warn!("connections were still open at the end");
    }
    drop(server);
    if tokio::time::timeout(LAST_WORDS, published).await.is_err() {
        warn!("events were still unsent at the end");
    }
    Ok(())
}

fn take_listener() -> Result<tokio::net::UnixListener> {
    let failed = |operation| IoError::at(operation, "standard input");
    let socket = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(failed("duplicate"))?;
    let listener = UnixListener::from(socket);
    listener
        .set_nonblocking(true)
        .map_err(failed("set non-blocking"))?;
    let listener = tokio::net::UnixListener::from_std(listener).map_err(failed("listen on"))?;
    let null = std::fs::File::open("/dev/null").map_err(IoError::at("open", "/dev/null"))?;
    rustix::stdio::dup2_stdin(null).map_err(IoError::at("replace", "standard input"))?;
    Ok(listener)
}

/// A service manager that stops containerd may send SIGTERM to all it finds. The pod ends when containerd says so.
fn ignore_terminations() -> Result<impl Future<Output = ()> + Send> {
    let handler = |kind| signal(kind).map_err(IoError::at("handle signals of", "/proc/self"));
    let mut terminate = handler(SignalKind::terminate())?;
    let mut interrupt = handler(SignalKind::interrupt())?;
    Ok(async move {
        loop {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            warn!(
                "{name} ignored: a pod ends through containerd; SIGKILL ends the shim and the pod with it"
            );
        }
    })
}
