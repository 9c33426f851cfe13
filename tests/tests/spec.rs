//! What the shim reads in a bundle's `config.json`, against what the crate `oci-spec` reads there. The bundles are
//! containerd's own; what this machine cannot have (SELinux) and what containerd does not know (user namespaces on 1.6)
//! is written into copies.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespace, LinuxNamespaceBuilder,
    LinuxNamespaceType, Spec as OciSpec,
};
use pause::{HolderChoice, IdMap, Namespace, UserNamespace};
use shim::runtime::spec::Spec;
use shim_tests::daemon::Handler;
use shim_tests::slot::text;
use shim_tests::{
    Daemon, Options, Pod, PodSpec, Version, in_every_mode, lab, left_out, on_every_containerd,
};

/// The bundle of a task of CRI's.
fn bundle(daemon: &Daemon, id: &str) -> PathBuf {
    daemon
        .directory()
        .join("state/io.containerd.runtime.v2.task/k8s.io")
        .join(id)
}

/// Both readers on the same file.
struct Readers {
    shim: Spec,
    oci: OciSpec,
}

impl Readers {
    #[track_caller]
    fn load(bundle: &Path) -> Self {
        Self {
            shim: Spec::load(bundle).unwrap(),
            oci: OciSpec::load(bundle.join("config.json")).unwrap(),
        }
    }

    fn annotation(&self, key: &str) -> Option<&str> {
        let annotations = self.oci.annotations().as_ref()?;
        annotations.get(key).map(String::as_str)
    }

    fn namespace(&self, kind: LinuxNamespaceType) -> Namespace {
        let linux = self.oci.linux().as_ref().unwrap();
        let listed = linux.namespaces().iter().flatten();
        match listed.into_iter().find(|one| one.typ() == kind) {
            None => Namespace::Node,
            Some(namespace) => match namespace.path() {
                // To runc, an empty path is none.
                Some(path) if path != Path::new("") => Namespace::Join(path.clone()),
                _ => Namespace::New,
            },
        }
    }

    /// What both read is the same, to the last field.
    #[track_caller]
    fn assert_alike(&self) {
        let linux = self.oci.linux().as_ref().unwrap();
        let group = self
            .annotation("io.containerd.runc.v2.group")
            .or_else(|| self.annotation("io.kubernetes.cri.sandbox-id"));
        assert_eq!(self.shim.group(), group);
        let cgroups_path = linux.cgroups_path().as_deref().map(text);
        assert_eq!(self.shim.cgroups_path(), cgroups_path.as_deref());
        assert_eq!(self.shim.mount_label(), non_empty(linux.mount_label()));
        self.assert_process_namespaces_alike();
        self.assert_sandboxes_alike();
    }

    #[track_caller]
    fn assert_process_namespaces_alike(&self) {
        let (is_there, path) = match self.namespace(LinuxNamespaceType::Pid) {
            Namespace::Node => (false, None),
            Namespace::New => (true, None),
            Namespace::Join(path) => (true, Some(path)),
        };
        assert_eq!(self.shim.has_pid_namespace(), is_there);
        assert_eq!(self.shim.pid_namespace_path(), path.as_deref());
    }

    #[track_caller]
    fn assert_sandboxes_alike(&self) {
        let linux = self.oci.linux().as_ref().unwrap();
        // A process, because only a process has the process namespace of the spec.
        let sandbox = self.shim.sandbox(HolderChoice::Process);
        let namespaces = sandbox.namespaces;
        for (kind, read) in [
            (LinuxNamespaceType::Network, namespaces.net),
            (LinuxNamespaceType::Ipc, namespaces.ipc),
            (LinuxNamespaceType::Uts, namespaces.uts),
            (LinuxNamespaceType::Pid, namespaces.pid),
        ] {
            assert_eq!(read, self.namespace(kind), "{kind}");
        }
        let user = match self.namespace(LinuxNamespaceType::User) {
            Namespace::Node => UserNamespace::Node,
            Namespace::Join(path) => UserNamespace::Join(path),
            Namespace::New => UserNamespace::New {
                uid_map: id_maps(linux.uid_mappings()),
                gid_map: id_maps(linux.gid_mappings()),
            },
        };
        assert_eq!(namespaces.user, user);
        assert_eq!(sandbox.hostname.as_deref(), non_empty(self.oci.hostname()));
        assert_eq!(
            sandbox.domainname.as_deref(),
            non_empty(self.oci.domainname())
        );
        let sysctls: BTreeMap<String, String> = linux
            .sysctl()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect();
        assert_eq!(sandbox.sysctls, sysctls);
    }
}

fn non_empty(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.is_empty())
}

fn id_maps(mappings: &Option<Vec<LinuxIdMapping>>) -> Vec<IdMap> {
    let mappings = mappings.iter().flatten();
    let map = |mapping: &LinuxIdMapping| IdMap {
        container: mapping.container_id(),
        host: mapping.host_id(),
        size: mapping.size(),
    };
    mappings.map(map).collect()
}

/// A copy of a bundle whose spec is changed by `oci-spec`.
fn changed_copy(bundle: &Path, change: impl FnOnce(&mut OciSpec)) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let mut spec = OciSpec::load(bundle.join("config.json")).unwrap();
    change(&mut spec);
    spec.save(copy.path().join("config.json")).unwrap();
    copy
}

/// A namespace to be made, or the one at `path`.
fn namespace_of(kind: LinuxNamespaceType, path: Option<&str>) -> LinuxNamespace {
    let builder = LinuxNamespaceBuilder::default().typ(kind);
    match path {
        Some(path) => builder.path(path),
        None => builder,
    }
    .build()
    .unwrap()
}

fn mapping(host: u32) -> LinuxIdMapping {
    LinuxIdMappingBuilder::default()
        .container_id(0_u32)
        .host_id(host)
        .size(65536_u32)
        .build()
        .unwrap()
}

/// The kinds of pods whose specs differ.
fn kinds_of_pods() -> [PodSpec; 4] {
    [
        PodSpec::new("ordinary")
            .sysctl("net.core.somaxconn", "99")
            .sysctl("kernel.shm_rmid_forced", "1"),
        PodSpec::new("shared").shared_processes(),
        PodSpec::new("hostpid").host_pid(),
        PodSpec::new("hostipc").host_ipc(),
    ]
}

#[track_caller]
fn assert_sandbox_alike(daemon: &Daemon, pod: &Pod<'_>) -> Readers {
    let readers = Readers::load(&bundle(daemon, &pod.id));
    readers.assert_alike();
    assert_eq!(readers.shim.group(), Some(&*pod.id));
    readers
}

on_every_containerd! {
    fn the_spec_of_a_sandbox_is_read_as_oci_spec_reads_it(version) {
        let daemon = Daemon::start(version);
        let [ordinary, others @ ..] = kinds_of_pods();
        let pod = ordinary.run(&daemon);
        let sandbox = assert_sandbox_alike(&daemon, &pod).shim.sandbox(HolderChoice::Process);
        assert_eq!(sandbox.hostname.as_deref(), Some("ordinary"));
        assert_eq!(sandbox.sysctls["net.core.somaxconn"], "99");
        assert!(matches!(sandbox.namespaces.net, Namespace::Join(_)), "{:?}", sandbox.namespaces);
        for other in others {
            assert_sandbox_alike(&daemon, &other.run(&daemon));
        }
        assert_sandbox_alike(&daemon, &PodSpec::new("hostnet").host_network().run(&daemon));
        daemon.end();
    }

    fn what_is_written_into_the_spec_of_a_sandbox_is_read_as_oci_spec_reads_it(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("changed").run(&daemon);
        let bundle = bundle(&daemon, &pod.id);
        let copy = changed_copy(&bundle, |spec| {
            spec.set_domainname(Some("domain.test".to_owned()));
            let mut annotations = spec.annotations().clone().unwrap();
            annotations.insert("io.containerd.runc.v2.group".to_owned(), "together".to_owned());
            spec.set_annotations(Some(annotations));
            let mut linux = spec.linux().clone().unwrap();
            linux.set_mount_label(Some("system_u:object_r:container_file_t:s0:c1,c2".to_owned()));
            linux.set_cgroups_path(Some("kubepods.slice:cri-containerd:changed".into()));
            linux.set_uid_mappings(Some(vec![mapping(300_000)]));
            linux.set_gid_mappings(Some(vec![mapping(400_000)]));
            linux.set_namespaces(Some(vec![
                namespace_of(LinuxNamespaceType::User, None),
                namespace_of(LinuxNamespaceType::Pid, Some("/proc/1/ns/pid")),
            ]));
            spec.set_linux(Some(linux));
        });
        let readers = Readers::load(copy.path());
        readers.assert_alike();
        assert_eq!(readers.shim.group(), Some("together"));
        assert!(readers.shim.mount_label().is_some());
        let UserNamespace::New { uid_map, gid_map } = readers.shim.sandbox(HolderChoice::Process).namespaces.user else {
            panic!("no user namespace is made");
        };
        assert_eq!((uid_map[0].host, gid_map[0].host), (300_000, 400_000));
        daemon.end();
    }

    fn the_spec_of_a_sandbox_with_a_user_namespace_is_read_as_oci_spec_reads_it(version) {
        if version == Version::V1_6 {
            left_out!("1.6 does not know the request for a user namespace");
        }
        let runc = format!("BinaryName = '{}'", text(&lab::runc_for_user_namespaces()));
        let options = Options {
            handlers: vec![Handler::of_the_stock_type("userns", version, &runc)],
            ..Options::default()
        };
        let daemon = Daemon::with(version, &options);
        let pod = PodSpec::new("mapped").handler("userns").user_namespace(300_000).run(&daemon);
        let readers = assert_sandbox_alike(&daemon, &pod);
        assert_ne!(readers.shim.sandbox(HolderChoice::Process).namespaces.user, UserNamespace::Node);
        daemon.end();
    }
}

// Through the Sandbox API a sandbox has no config.json; its containers do.
in_every_mode! {
    fn the_spec_of_a_container_is_read_as_oci_spec_reads_it(version) {
        let daemon = Daemon::start(version);
        for spec in kinds_of_pods() {
            let pod = spec.run(&daemon);
            let container = pod.sleeper("app");
            let readers = Readers::load(&bundle(&daemon, &container.id));
            readers.assert_alike();
            assert_eq!(readers.shim.group(), Some(&*pod.id));
            let cgroup = readers.shim.cgroups_path().unwrap();
            assert!(cgroup.ends_with(&container.id), "{cgroup}");
        }
        daemon.end();
    }
}
