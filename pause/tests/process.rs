//! S5: the built-in pause program as PID 1 of a shared process namespace.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use common::{config, end, inode, inside, run_inside, wait};
use pause::{
    HolderChoice, HolderKind, Namespace, NamespaceKind, Sandbox, SandboxConfig, Signalled,
};
use rustix::process::Signal;

fn shared() -> SandboxConfig {
    let mut config = config();
    config.namespaces.pid = Namespace::New;
    config
}

fn proc(sandbox: &Sandbox, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/{file}", sandbox.pid()))
}

fn status(sandbox: &Sandbox, field: &str) -> String {
    let status = fs::read_to_string(proc(sandbox, "status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with(&format!("{field}:")));
    line.unwrap().split_once(':').unwrap().1.trim().to_owned()
}

#[test]
fn s5_pause_is_pid_1_and_every_container_would_see_the_others() {
    let sandbox = Sandbox::create(&shared()).unwrap();
    assert_eq!(sandbox.holder_kind(), HolderKind::Process);
    assert_eq!(sandbox.paths().len(), 4);
    assert!(status(&sandbox, "NSpid").ends_with("\t1"));
    assert_eq!(status(&sandbox, "PPid"), std::process::id().to_string());
    let seen = run_inside(
        &sandbox,
        "cat /proc/1/comm; tr '\\0' '\\n' < /proc/1/cmdline; ps -o pid,args -p 1",
    );
    assert!(seen.starts_with("pause\n/pause\n"), "{seen}");
    assert!(seen.contains("1 /pause"), "{seen}");
    end(sandbox);
}

#[test]
fn s5_a_pod_that_a_thread_holds_gets_its_pid_1_later_and_once() {
    let mut sandbox = Sandbox::create(&config()).unwrap();
    let thread = sandbox.pid();
    let (pid_1, new) = sandbox.share_processes().unwrap();
    assert!(new);
    assert_eq!(sandbox.share_processes().unwrap(), (pid_1, false));
    assert_eq!(
        (sandbox.holder_kind(), sandbox.pid()),
        (HolderKind::Thread, thread)
    );
    let status = fs::read_to_string(format!("/proc/{pid_1}/status")).unwrap();
    let inside = status.lines().find(|line| line.starts_with("NSpid:"));
    assert!(inside.unwrap().ends_with("\t1"), "{status}");
    for kind in ["net", "ipc", "uts"] {
        let of = |pid| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_eq!(of(pid_1), of(thread), "{kind}");
    }
    // PID 1 ends with the sandbox.
    sandbox.end();
    assert_eq!(wait(pid_1).terminating_signal(), Some(9));
}

#[test]
fn s5_sigterm_or_sigint_to_pid_1_ends_it_with_exit_code_0_also_from_inside() {
    for signal in [Signal::TERM, Signal::INT] {
        let sandbox = Sandbox::create(&shared()).unwrap();
        assert_eq!(sandbox.signal(signal).unwrap(), Signalled::Delivered);
        assert_eq!(wait(sandbox.pid()).exit_status(), Some(0));
    }
    for name in ["TERM", "INT"] {
        let sandbox = Sandbox::create(&shared()).unwrap();
        // The shell is killed with its namespace.
        inside(&sandbox, &format!("kill -{name} 1; sleep 30"));
        assert_eq!(wait(sandbox.pid()).exit_status(), Some(0), "{name}");
    }
}

#[test]
fn s5_other_signals_from_inside_do_nothing_and_sigkill_from_outside_ends_it() {
    let sandbox = Sandbox::create(&shared()).unwrap();
    run_inside(
        &sandbox,
        "for s in HUP QUIT USR1 USR2 ALRM KILL STOP SEGV; do kill -$s 1; done; kill -0 1",
    );
    sandbox.signal(Signal::HUP).unwrap();
    run_inside(&sandbox, "kill -0 1");
    sandbox.signal(Signal::KILL).unwrap();
    assert_eq!(wait(sandbox.pid()).terminating_signal(), Some(9));
    // A signal to a process that is gone is an error, and hits no other process.
    assert!(sandbox.signal(Signal::TERM).is_err());
}

#[test]
fn s5_ten_thousand_orphans_are_reaped_without_one_left() {
    let sandbox = Sandbox::create(&shared()).unwrap();
    // A subshell's background child is orphaned at once, and PID 1 inherits the child.
    let counted = run_inside(
        &sandbox,
        "i=0; while [ $i -lt 10000 ]; do (true & ) ; i=$((i+1)); done
         n=0; while [ $n -lt 100 ] && grep -qs '^State:.Z' /proc/[0-9]*/status; do n=$((n+1)); sleep 0.05; done
         grep -ls '^State:.Z' /proc/[0-9]*/status | wc -l; cat /proc/1/task/1/children | wc -w; cat /proc/loadavg",
    );
    let lines: Vec<&str> = counted.lines().collect();
    assert_eq!(lines[0], "0", "{counted}");
    // The last process id of the namespace shows that the orphans were there.
    let last: u32 = lines[2].rsplit(' ').next().unwrap().parse().unwrap();
    assert!(last > 10_000, "{counted}");
    end(sandbox);
}

#[test]
fn s5_pid_1_has_no_privilege_file_root_or_argument() {
    let sandbox = Sandbox::create(&shared()).unwrap();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(&sandbox, set), "0000000000000000", "{set}");
    }
    for ids in ["Uid", "Gid"] {
        assert_eq!(status(&sandbox, ids), "65535\t65535\t65535\t65535", "{ids}");
    }
    assert_eq!(status(&sandbox, "Groups"), "");
    assert_eq!(status(&sandbox, "NoNewPrivs"), "1");
    assert_eq!(status(&sandbox, "Seccomp"), "2");
    assert_eq!(status(&sandbox, "Threads"), "1");
    // The files in /proc belong to root, because the process is not dumpable.
    assert_eq!(fs::metadata(proc(&sandbox, "environ")).unwrap().uid(), 0);
    assert_eq!(fs::read_dir(proc(&sandbox, "fd")).unwrap().count(), 0);
    assert_eq!(fs::read(proc(&sandbox, "environ")).unwrap(), b"");
    assert_eq!(fs::read(proc(&sandbox, "cmdline")).unwrap(), b"/pause\0");
    for directory in ["root", "cwd"] {
        assert_eq!(
            fs::read_dir(proc(&sandbox, &format!("{directory}/")))
                .unwrap()
                .count(),
            0
        );
        assert!(fs::write(proc(&sandbox, &format!("{directory}/x")), "x").is_err());
    }
    assert_ne!(
        inode(proc(&sandbox, "ns/cgroup")),
        inode("/proc/self/ns/cgroup")
    );
    // One mount: the empty root, and none of the node's.
    assert_eq!(
        fs::read_to_string(proc(&sandbox, "mountinfo"))
            .unwrap()
            .lines()
            .count(),
        1
    );
    end(sandbox);
}

#[test]
fn s5_only_the_published_program_and_its_name_are_mapped_and_private_memory_is_under_40_kb() {
    let sandbox = Sandbox::create(&shared()).unwrap();
    let maps = fs::read_to_string(proc(&sandbox, "maps")).unwrap();
    let maps: Vec<&str> = maps
        .lines()
        .filter(|line| !line.contains("[vsyscall]"))
        .collect();
    let [program, name] = maps[..] else {
        panic!("{maps:?}");
    };
    assert!(
        program.contains(" r-xp ") && program.contains("/memfd:pause"),
        "{program}"
    );
    // No file. Linux 6.1 calls the page a heap, because an empty heap begins and ends there.
    let inode = name.split_whitespace().nth(4);
    assert!(name.contains(" r--p ") && inode == Some("0"), "{name}");
    let private = common::private_kb(sandbox.pid().as_raw_pid());
    println!(
        "private memory: {private} kB; program: {} bytes",
        pause::PROGRAM.len()
    );
    assert!(private < 40, "{private} kB");
    end(sandbox);
}

/// CAP_SYS_PTRACE in the node's user namespace passes every check of the kernel. So such a container must find nothing:
/// no environment, no stack, no data, and a program that the container cannot change.
#[test]
fn s5_a_container_with_cap_sys_ptrace_finds_nothing_in_pid_1() {
    let sandbox = Sandbox::create(&shared()).unwrap();
    let seen = run_inside(
        &sandbox,
        "readlink /proc/1/exe; wc -c < /proc/1/environ; tr -d '\\0' < /proc/1/auxv | wc -c
         grep -c -v vsyscall /proc/1/maps; ls /proc/1/fd | wc -l; ls -A /proc/1/root/ | wc -l",
    );
    assert_eq!(
        seen.split_whitespace().collect::<Vec<_>>(),
        ["/memfd:pause", "(deleted)", "0", "0", "2", "0", "0"]
    );
    // The two mappings hold the program as published, and its name.
    let copy = tempfile::NamedTempFile::new().unwrap();
    let read = |page: usize| {
        let to = copy.path().display();
        run_inside(
            &sandbox,
            &format!("dd if=/proc/1/mem of={to} bs=4096 skip={page} count=1 2>&1"),
        );
        fs::read(copy.path()).unwrap()
    };
    let (program, name) = (read(0x400), read(0x410));
    // Behind what is loaded, the file has a table of sections, which may reach into a second page.
    let published = &pause::PROGRAM[..pause::PROGRAM.len().min(program.len())];
    assert!(program.starts_with(published) && name.starts_with(b"/pause\0"));
    let rest = program[published.len()..].iter().chain(&name[7..]);
    assert_eq!(rest.filter(|byte| **byte != 0).count(), 0);

    for line in [
        "echo x > /proc/1/exe",
        "echo x >> /proc/1/exe",
        "truncate -s 0 /proc/1/exe",
        "cp /bin/true /proc/1/exe",
    ] {
        assert!(!inside(&sandbox, line).status.success(), "{line}");
    }
    end(sandbox);
}

#[test]
fn s5_the_pod_cannot_find_the_shim() {
    let sandbox = Sandbox::create(&shared()).unwrap();
    let seen = run_inside(
        &sandbox,
        "grep PPid /proc/1/status; for p in /proc/[0-9]*; do readlink $p/exe; done",
    );
    assert!(seen.starts_with("PPid:\t0\n"), "{seen}");
    let own = std::env::current_exe().unwrap();
    assert!(!seen.contains(own.to_str().unwrap()), "{seen}");
    end(sandbox);
}

#[test]
fn s5_pause_dies_with_the_thread_that_started_it() {
    let sandbox = Sandbox::create(&shared()).unwrap();
    let pid = sandbox.pid();
    end(sandbox);
    assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
}

/// Not a test: the shim that the test below starts.
#[test]
#[ignore = "it is started by the test below"]
fn a_shim_that_waits_to_be_killed() {
    let sandbox = Sandbox::create(&shared()).unwrap();
    println!("\npause is {}", sandbox.pid());
    std::thread::park();
}

#[test]
fn s5_pause_dies_with_the_shim() {
    let mut shim = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_shim_that_waits_to_be_killed",
            "--ignored",
            "--nocapture",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pause = BufReader::new(shim.stdout.take().unwrap())
        .lines()
        .find_map(|line| Some(line.unwrap().strip_prefix("pause is ")?.to_owned()))
        .unwrap();
    shim.kill().unwrap();
    shim.wait().unwrap();
    // The process may be a zombie that its new parent has not reaped yet.
    common::soon(|| match fs::read_to_string(format!("/proc/{pause}/stat")) {
        Ok(stat) => stat.contains(") Z ").then_some(()),
        Err(_) => Some(()),
    });
}

#[test]
fn a_process_can_hold_an_ordinary_pod_too() {
    let mut config = config();
    config.holder = HolderChoice::Process;
    config.hostname = Some("pod-a".to_owned());
    let before = common::traces();
    let sandbox = Sandbox::create(&config).unwrap();
    assert_eq!(sandbox.holder_kind(), HolderKind::Process);
    assert_eq!(run_inside(&sandbox, "uname -n").trim(), "pod-a");
    assert_eq!(sandbox.signal(Signal::TERM).unwrap(), Signalled::Delivered);
    assert_eq!(wait(sandbox.pid()).exit_status(), Some(0));
    // The namespaces stay while the sandbox does, because the thread stands in them too.
    let net = rustix::fs::fstat(sandbox.namespace(NamespaceKind::Net).unwrap()).unwrap();
    assert_ne!(net.st_ino, common::nodes_inode(NamespaceKind::Net));
    sandbox.end();
    common::assert_no_new_traces(&before);
}

#[test]
fn the_node_keeps_its_mounts() {
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    // Another process may mount something during a round, but not during each round.
    let mut rounds = (0..20).map(|_| {
        let before = mounts();
        let sandbox = Sandbox::create(&shared()).unwrap();
        let during = mounts();
        end(sandbox);
        (before, during, mounts())
    });
    let kept = rounds.any(|(before, during, after)| before == during && during == after);
    assert!(kept, "each time there are others");
}

#[test]
fn die_with_parent_kills_a_child_whose_thread_is_gone() {
    let spawned = std::thread::spawn(|| {
        let mut command = Command::new("sleep");
        pause::die_with_parent(command.arg("60")).spawn().unwrap()
    });
    let mut child = spawned.join().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(9)
    );
}
