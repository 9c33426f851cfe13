//! The Task service of one shim, called from many threads at once: for races and storms.
//!
//! The shim is started as in [`crate::raw`]. The containers share a root filesystem and differ by their ids, as the
//! containers of a pod do. The shim's events go to the test's real containerd.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use containerd_shim_protos::api::{CreateTaskRequest, CreateTaskResponse};
use serde_json::{Value, json};

use crate::calls::{Answer, Shim, Streams, runtime_options};
use crate::daemon::Daemon;
use crate::raw::{Bundle, Ran};
use crate::slot::text;
use crate::until::eventually;

/// One shim and its containers.
pub struct Group<'a> {
    daemon: &'a Daemon,
    first: Bundle<'a>,
    tasks: Tasks,
}

/// The part of a [`Group`] that threads may share.
pub struct Tasks {
    id: String,
    bundle: PathBuf,
    spec: Value,
    namespace: String,
    cgroup_parent: String,
    started: Ran,
    /// The folder of the shim's socket, where that is another one outside of the shim's mount namespace.
    sockets: Option<PathBuf>,
    ids: Mutex<BTreeSet<String>>,
    /// A connection to the shim.
    pub shim: Shim,
}

impl Deref for Group<'_> {
    type Target = Tasks;

    fn deref(&self) -> &Tasks {
        &self.tasks
    }
}

impl<'a> Group<'a> {
    /// Starts the shim, without a container.
    #[track_caller]
    pub fn start(daemon: &'a Daemon, id: &str) -> Self {
        Self::start_of(daemon, Bundle::new(daemon, id), None)
    }

    /// As [`Self::start`], with more variables in the shim's environment.
    #[track_caller]
    pub fn start_with(
        daemon: &'a Daemon,
        id: &str,
        environment: Vec<(&'static str, String)>,
    ) -> Self {
        let mut first = Bundle::new(daemon, id);
        first.environment = environment;
        Self::start_of(daemon, first, None)
    }

    /// As [`Self::start`], in this bundle. `sockets` is the folder of the shim's socket, where the shim has a mount
    /// namespace of its own.
    #[track_caller]
    pub fn start_of(daemon: &'a Daemon, first: Bundle<'a>, sockets: Option<PathBuf>) -> Self {
        let mut spec = first.plain_spec(&[]);
        spec["root"]["path"] = json!(text(&first.path.join("rootfs")));
        // The kernel spends most of a container's time on its network namespace.
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "network");
        // runc makes a link in /dev, and the root is shared by all containers.
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}));
        let first = first.write_spec(&spec);
        let started = first.start(b"");
        assert!(started.status.success(), "{}", started.text());
        daemon.look();
        let tasks = Tasks {
            id: first.id.clone(),
            bundle: first.path.clone(),
            spec,
            namespace: daemon.names.name(),
            cgroup_parent: daemon.names.cgroup_parent(),
            shim: connect(&started, sockets.as_deref()),
            started,
            sockets,
            ids: Mutex::default(),
        };
        Self {
            daemon,
            first,
            tasks,
        }
    }

    /// Runs `delete` for the shim's first bundle.
    #[track_caller]
    pub fn run_delete(&self) -> Ran {
        self.first.delete()
    }

    /// Shutdown; waits until the shim is gone.
    #[track_caller]
    pub fn end(self) {
        self.shut_down();
    }

    /// As [`Self::end`]; then runs `delete`, as containerd does when a shim is gone.
    #[track_caller]
    pub fn end_and_delete(self) {
        self.shut_down();
        let deleted = self.run_delete();
        assert!(deleted.status.success(), "delete: {}", deleted.text());
    }

    #[track_caller]
    fn shut_down(&self) {
        let shim = self.daemon.shim();
        self.shim.shutdown(&self.id);
        eventually(Duration::from_secs(20), || {
            if shim.alive() {
                Err("the shim lives on after Shutdown".to_owned())
            } else {
                Ok(())
            }
        });
    }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        for id in self.ids.lock().unwrap().iter() {
            self.daemon.expect_task(id);
            if std::thread::panicking() {
                let _ = fs::remove_dir_all(self.runc_states().join(id));
            }
        }
    }
}

#[track_caller]
fn connect(started: &Ran, sockets: Option<&Path>) -> Shim {
    let address = started.address();
    let Some(sockets) = sockets else {
        return Shim::connect(started);
    };
    let name = Path::new(&address).file_name().unwrap();
    Shim::connect_at(started, &format!("unix://{}", text(&sockets.join(name))))
}

impl Tasks {
    /// Another connection.
    #[track_caller]
    pub fn connect(&self) -> Shim {
        connect(&self.started, self.sockets.as_deref())
    }

    /// The directory of runc's states.
    pub fn runc_states(&self) -> PathBuf {
        Path::new("/run/containerd/runc").join(&self.namespace)
    }

    /// A bundle for container `id` that runs `sh -c SCRIPT`, with a spec changed by `change`.
    pub fn bundle(&self, id: &str, script: &str, change: impl FnOnce(&mut Value)) -> PathBuf {
        self.ids.lock().unwrap().insert(id.to_owned());
        let path = if id == self.id {
            self.bundle.clone()
        } else {
            self.bundle.join("members").join(id)
        };
        fs::create_dir_all(&path).unwrap();
        let mut spec = self.spec.clone();
        spec["process"]["args"] = json!(["sh", "-c", script]);
        spec["linux"]["cgroupsPath"] = json!(format!("{}/{id}", self.cgroup_parent));
        change(&mut spec);
        fs::write(path.join("config.json"), serde_json::to_vec(&spec).unwrap()).unwrap();
        path
    }

    /// Create of a container that runs `sh -c SCRIPT`.
    pub fn create(&self, id: &str, script: &str) -> Answer<u32> {
        let bundle = self.bundle(id, script, |_| {});
        self.create_from(id, &bundle)
    }

    /// Create of a container with a spec changed by `change`.
    pub fn create_with(
        &self,
        id: &str,
        script: &str,
        change: impl FnOnce(&mut Value),
    ) -> Answer<u32> {
        let bundle = self.bundle(id, script, change);
        self.create_from(id, &bundle)
    }

    /// Create from a bundle.
    pub fn create_from(&self, id: &str, bundle: &Path) -> Answer<u32> {
        self.create_with_streams(id, bundle, &Streams::default())
    }

    /// Create from a bundle, with these streams.
    pub fn create_with_streams(&self, id: &str, bundle: &Path, streams: &Streams) -> Answer<u32> {
        self.shim.create(id, bundle, streams, Vec::new())
    }

    /// Create from a bundle, with an options table of ours.
    pub fn create_with_options(&self, id: &str, bundle: &Path, options: &str) -> Answer<u32> {
        let request = CreateTaskRequest {
            id: id.to_owned(),
            bundle: text(bundle),
            options: Some(runtime_options(options)).into(),
            ..CreateTaskRequest::default()
        };
        self.shim
            .call::<CreateTaskResponse>("Create", &request)
            .map(|response| response.pid)
    }

    /// Removes the bundle of a deleted container.
    pub fn remove_bundle(&self, id: &str) {
        if id != self.id {
            fs::remove_dir_all(self.bundle.join("members").join(id)).unwrap();
        }
    }

    /// Create and Start of a container, which must both succeed. Gives the pid.
    #[track_caller]
    pub fn run(&self, id: &str, script: &str) -> u32 {
        let pid = self
            .create(id, script)
            .unwrap_or_else(|refusal| panic!("create {id}: {refusal:?}"));
        self.shim
            .start(id, "")
            .unwrap_or_else(|refusal| panic!("start {id}: {refusal:?}"));
        pid
    }

    /// Kills a container and deletes it.
    #[track_caller]
    pub fn remove(&self, id: &str) {
        // The container may have ended by itself.
        let _ = self.shim.kill(id, "", 9);
        self.shim
            .wait(id, "")
            .unwrap_or_else(|refusal| panic!("wait for {id}: {refusal:?}"));
        self.shim
            .delete(id, "")
            .unwrap_or_else(|refusal| panic!("delete {id}: {refusal:?}"));
        self.remove_bundle(id);
    }
}
