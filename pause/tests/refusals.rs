//! Bad input is refused with a text that names what was wrong, and leaves nothing behind.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::path::Path;

use common::config;
use pause::{Class, Error, HolderChoice, IdMap, Namespace, Sandbox, SandboxConfig, UserNamespace};

/// The sandbox is refused with that text and class, and nothing is left.
fn refused(config: &SandboxConfig, text: &str, class: Class) -> Error {
    let before = common::traces();
    let error = Sandbox::create(config).expect_err(text);
    common::assert_no_new_traces(&before);
    assert!(error.to_string().contains(text), "{error} / {text}");
    assert_eq!(error.class(), class, "{error}");
    error
}

fn join(path: impl AsRef<Path>) -> Namespace {
    Namespace::Join(path.as_ref().to_owned())
}

#[test]
fn a_path_that_does_not_exist() {
    let mut wanted = config();
    wanted.namespaces.net = join("/run/netns/there-is-none/x");
    let text = "join network namespace /run/netns/there-is-none/x: ";
    refused(&wanted, text, Class::NotFound);
}

#[test]
fn a_path_that_is_a_plain_file_a_directory_a_device_or_a_fifo() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let fifo = folder.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    for path in [
        file.as_path(),
        folder.path(),
        Path::new("/dev/null"),
        &fifo,
        Path::new("/proc/self/status"),
    ] {
        let mut wanted = config();
        wanted.namespaces.ipc = join(path);
        let text = format!(
            "join IPC namespace {}: not a namespace file",
            path.display()
        );
        refused(&wanted, &text, Class::InvalidInput);
    }
}

#[test]
fn a_path_to_a_namespace_of_another_kind() {
    for file in ["ipc", "uts", "pid", "user", "mnt", "cgroup"] {
        let mut wanted = config();
        wanted.namespaces.net = join(format!("/proc/self/ns/{file}"));
        refused(
            &wanted,
            "it is a namespace of another kind",
            Class::InvalidInput,
        );
    }
    let mut wanted = config();
    wanted.namespaces.user = UserNamespace::Join("/proc/self/ns/net".into());
    refused(
        &wanted,
        "join user namespace /proc/self/ns/net",
        Class::InvalidInput,
    );
}

#[test]
fn a_thread_for_what_only_a_process_can_hold() {
    let mut wanted = config();
    wanted.holder = HolderChoice::Thread;
    wanted.namespaces.pid = Namespace::New;
    refused(
        &wanted,
        "a process namespace needs holder process",
        Class::InvalidInput,
    );
    wanted.namespaces.pid = Namespace::Node;
    let map = vec![IdMap {
        container: 0,
        host: 0,
        size: 1,
    }];
    wanted.namespaces.user = UserNamespace::New {
        uid_map: map.clone(),
        gid_map: map,
    };
    refused(
        &wanted,
        "a user namespace needs holder process",
        Class::InvalidInput,
    );
}

#[test]
fn a_hostname_that_no_kernel_takes() {
    for name in ["", "a\nb", &"x".repeat(65)] {
        let mut wanted = config();
        wanted.hostname = Some(name.to_owned());
        refused(&wanted, "set hostname", Class::InvalidInput);
    }
}

#[test]
fn a_sysctl_outside_the_pod() {
    let mut wanted = config();
    wanted
        .sysctls
        .insert("kernel.core_pattern".to_owned(), "x".to_owned());
    refused(
        &wanted,
        "sysctl \"kernel.core_pattern\": not kept per namespace",
        Class::InvalidInput,
    );
}

/// These errors come to light only when the namespaces, the thread and, with a process as holder, the pause program are
/// there.
#[test]
fn a_sysctl_that_the_kernel_does_not_have_or_whose_value_it_does_not_take() {
    let map = vec![IdMap {
        container: 0,
        host: 300_000,
        size: 65536,
    }];
    let new_user = UserNamespace::New {
        uid_map: map.clone(),
        gid_map: map,
    };
    for user in [UserNamespace::Node, new_user] {
        for (pid, holder) in [
            (Namespace::Node, HolderChoice::Auto),
            (Namespace::Node, HolderChoice::Process),
            (Namespace::New, HolderChoice::Process),
        ] {
            for (key, value) in [
                ("net.core.there_is_none", "1"),
                ("net.core.somaxconn", "many"),
            ] {
                let mut wanted = config();
                wanted.namespaces.user = user.clone();
                wanted.namespaces.pid = pid.clone();
                wanted.holder = holder;
                wanted.sysctls.insert(key.to_owned(), value.to_owned());
                let error = refused(
                    &wanted,
                    &format!("write sysctl \"{key}\""),
                    Class::InvalidInput,
                );
                assert!(error.to_string().contains(&format!("{value:?}")), "{error}");
            }
        }
    }
}

/// The thread stands in a process namespace whose PID 1 has ended: the program cannot be started in it.
#[test]
fn a_process_namespace_that_is_dead() {
    let mut first = config();
    first.namespaces.pid = Namespace::New;
    let dead = Sandbox::create(&first).unwrap();
    dead.signal(rustix::process::Signal::KILL).unwrap();
    common::wait(dead.pid());
    // The path went with the process, but the sandbox still has the namespace open.
    let fd = std::os::fd::AsRawFd::as_raw_fd(&dead.namespace(pause::NamespaceKind::Pid).unwrap());
    let mut wanted = config();
    wanted.namespaces.pid = join(format!("/proc/self/fd/{fd}"));
    wanted.holder = HolderChoice::Process;
    refused(&wanted, "pause program: start: ", Class::Internal);
    dead.end();
}
