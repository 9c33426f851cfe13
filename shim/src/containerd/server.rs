//! The long-running server of one pod: one thread, one reactor. `pod::lifecycle` decides when the server ends.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use containerd_shim_protos::ttrpc::r#async::Server;
use containerd_shim_protos::ttrpc::r#async::transport::Listener;
use log::info;
use rustix::io::retry_on_intr;

use super::callers;
use super::events::publish;
use super::sandbox::SandboxService;
use super::task::TaskService;
use crate::container::Shared;
use crate::container::event::Events;
use crate::error::{Error, IoError, Result};
use crate::kernel::exits::Exits;
use crate::pod::Pod;
use crate::pod::lifecycle::{self, LAST_WORDS, Lifecycle, Occasion};
use crate::runtime::leftovers::Leftovers;

/// The two names of the Task service: the crate's, and that of version 2, which containerd calls before 2.0 and
/// wherever `start` has answered version 2. The messages are the same.
const TASK_V3: &str = "containerd.task.v3.Task";
const TASK_V2: &str = "containerd.task.v2.Task";

/// The server's command line.
#[derive(Debug)]
pub struct Settings {
    /// containerd's namespace.
    pub namespace: String,
    /// The path of containerd's ttrpc socket.
    pub events: String,
    /// The path of the shim's own socket.
    pub socket: PathBuf,
}

/// Serves the pod whose first bundle is the working directory, until the pod's lifecycle orders the end. Standard input
/// is the listening socket, standard output the pipe from `start`.
///
/// # Errors
/// `Io` when the working directory, the socket or a signal handler fails.
pub fn serve(settings: Settings) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(IoError::at("start the runtime of", "/proc/self"))?;
    let socket = settings.socket.clone();
    let served = runtime.block_on(run(settings));
    if served.is_err() {
        // The startup has failed. In this case nobody else removes the socket.
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
    let (events, queue) = Events::queue();
    let published = publish(queue, settings.events, settings.namespace.clone());
    let shared = Shared {
        namespace: settings.namespace.into(),
        first_bundle,
        exits,
        events,
        leftovers: Leftovers::default(),
    };
    let pod = Arc::new(Pod::new(shared, Lifecycle::new(settings.socket.clone())));
    let mut order_to_end = pod.lifecycle.order_to_end();
    let mut server = services(&pod, listener)?;
    wait_for_start()?;
    server
        .start()
        .await
        .map_err(|e| IoError::at("serve at", &settings.socket)(std::io::Error::other(e)))?;
    lifecycle::take_terminations(&pod, callers.count())?;
    info!(
        version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), socket:% = settings.socket.display();
        "shim serves"
    );
    pod.settle(Occasion::Begin);
    // The pod keeps the queue of events open, and the publisher ends when the queue is closed.
    drop(pod);
    // No error: the services keep the pod, and with the pod the sender, until the server is dropped.
    let order = order_to_end.wait_for(Option::is_some).await;
    let reason = order.ok().and_then(|reason| *reason);
    let answered = async {
        // Calls that are under way are answered before the connections close.
        let _ = server.shutdown().await;
        drop(server);
    };
    let reason = reason.ok_or(Error::Internal("the server ends without a reason"))?;
    lifecycle::last_words(reason, callers.gone(), answered, published).await;
    Ok(())
}

/// Returns when `start` has noted this process for `delete`. Standard output is a pipe that says so.
///
/// # Errors
/// `Internal` when `start` has ended before: nobody would find this process. `Io` when the kernel refuses.
fn wait_for_start() -> Result<()> {
    let failed = |operation| IoError::at(operation, "standard output");
    let told = retry_on_intr(|| rustix::io::read(std::io::stdout(), &mut [0; 1]));
    if told.map_err(failed("read"))? == 0 {
        return Err(Error::Internal(
            "start has ended before the server was noted",
        ));
    }
    let null = std::fs::File::create("/dev/null").map_err(IoError::at("open", "/dev/null"))?;
    Ok(rustix::stdio::dup2_stdout(null).map_err(failed("replace"))?)
}

/// The Task service under both names, and the Sandbox service.
fn services(pod: &Arc<Pod>, listener: Listener) -> Result<Server> {
    let task = TaskService { pod: pod.clone() };
    let sandbox = SandboxService { pod: pod.clone() };
    let v3 = create_task(Arc::new(task.clone()));
    let mut v2 = create_task(Arc::new(task));
    let v2 = v2
        .remove(TASK_V3)
        .map(|service| [(TASK_V2.to_owned(), service)].into())
        .ok_or(Error::Internal("the Task service has another name"))?;
    Ok(Server::new()
        .add_listener(listener)
        .register_service(v3)
        .register_service(v2)
        .register_service(create_sandbox(Arc::new(sandbox))))
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
