//! `containerd-shim-pause-v2 install` and `uninstall` on nodes with a real systemd and a real containerd.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing"
)]

use std::fs;
use std::path::Path;
use std::time::Duration;

use shim_tests::cri_calls::Calls;
use shim_tests::image::{self, PauseImage};
use shim_tests::lab::{self, ShimUnderTest};
use shim_tests::node::Node;
use shim_tests::until::ok_if;
use shim_tests::{
    PodSpec, Version, eventually, left_out, oci, on_every_containerd, on_the_newest_containerd,
    ours_only,
};

const HANDLER: &str = "pause";
const INSTALLED: &str = "/usr/local/bin/containerd-shim-pause-v2";
/// The binary before it is installed.
const OURS: &str = "/data/installer";
const STATE: &str = "/var/lib/containerd-shim-pause-v2";

/// As Debian's package has it, but for the node's disk, and for a containerd that dislikes the handler: with
/// /data/dislikes it does not start, with /data/hangs it never gets ready. With /data/wants it starts with the handler alone.
const UNIT: &str = "[Service]
Type=notify
ExecStart=/bin/sh -c 'if grep -rqs runtimes.pause /etc/containerd; then \
test ! -e /data/dislikes || exit 1; test ! -e /data/hangs || exec sleep 3600; \
elif test -e /data/wants; then exit 1; fi; \
exec /data/bin/containerd --root /data/root'
Environment=PATH=/usr/local/bin:/data/bin:/usr/sbin:/usr/bin:/sbin:/bin
Delegate=yes
KillMode=process
Restart=always
RestartSec=5
TasksMax=infinity
";

/// A node with containerd, and the binary that is not installed yet.
struct Machine {
    node: Node,
    version: Version,
}

impl Machine {
    fn boot(version: Version) -> Result<Self, String> {
        let node = Node::boot(&[])?;
        let data = node.data();
        let binaries = version.binaries();
        for (name, program) in [
            ("bin/containerd", binaries.join("containerd")),
            ("bin/ctr", binaries.join("ctr")),
            (
                "bin/containerd-shim-runc-v2",
                binaries.join("containerd-shim-runc-v2"),
            ),
            // The node's cgroups have no controllers.
            ("bin/runc", lab::helper("no-limits")),
            ("bin/runc.real", lab::runc()),
            ("installer", ShimUnderTest::Pause.binary(version)),
            ("busybox.tar", image::busybox()),
        ] {
            fs::copy(program, data.join(name)).unwrap();
        }
        fs::write(data.join("containerd.service"), UNIT).unwrap();
        node.run(&[
            "mkdir",
            "-p",
            "/etc/containerd",
            "/var/lib/kubelet",
            "/usr/local/bin",
        ]);
        node.run(&["systemctl", "link", "/data/containerd.service"]);
        let machine = Self { node, version };
        machine.write(
            "/var/lib/kubelet/config.yaml",
            "kind: KubeletConfiguration\ncgroupDriver: cgroupfs\n",
        );
        Ok(machine)
    }

    fn write(&self, path: &str, text: &str) {
        fs::write(self.node.data().join("text"), text).unwrap();
        self.node.run(&["cp", "/data/text", path]);
    }

    /// Gives containerd these files, and restarts containerd.
    fn configure(&self, files: &[(&str, String)]) {
        self.node.run(&["rm", "-rf", "/etc/containerd"]);
        self.node.run(&["mkdir", "/etc/containerd"]);
        for (name, text) in files {
            self.write(&format!("/etc/containerd/{name}"), text);
        }
        self.node.run(&["systemctl", "restart", "containerd"]);
    }

    /// Runs the binary in the node: whether it succeeds, and what it says.
    fn ours(&self, subcommand: &str) -> (bool, String) {
        let (good, said) = self.node.try_run(&[OURS, subcommand]);
        eprintln!(
            "--- {subcommand} on {}: {good}\n{said}",
            self.version.exact()
        );
        (good, said)
    }

    #[track_caller]
    fn does(&self, subcommand: &str) -> String {
        let (good, said) = self.ours(subcommand);
        assert!(good, "{subcommand}: {said}");
        said
    }

    /// containerd's pid, when containerd answers.
    #[track_caller]
    fn containerd(&self) -> String {
        self.node.run(&["ctr", "version"]);
        self.node.run(&[
            "systemctl",
            "show",
            "--value",
            "--property=MainPID",
            "containerd",
        ])
    }

    /// Every file that the installer may touch, with its mode and its bytes.
    fn files(&self) -> String {
        let places = "/etc/containerd /etc/containerd-shim-pause-v2 /usr/local/bin /var/lib/containerd-shim-pause-v2";
        let list = format!(
            "for f in $(find {places} 2>/dev/null | sort); do stat -c '%n %a %U' $f; test -d $f || cat $f | sha256sum; done"
        );
        self.node.run(&["sh", "-c", &list])
    }

    fn calls(&self) -> Calls {
        Calls::at(
            &self
                .node
                .seen("/run/containerd/containerd.sock")
                .display()
                .to_string(),
        )
    }

    /// A pod with the handler runs and goes.
    fn runs_a_pod(&self) {
        if let Some(name) = self.version.pause_image() {
            let pause = self.node.data().join("pause.tar");
            fs::copy(image::pause(name, PauseImage::Hollow), pause).unwrap();
            self.node
                .run(&["ctr", "-n", "k8s.io", "images", "import", "/data/pause.tar"]);
        }
        self.node.run(&[
            "ctr",
            "-n",
            "k8s.io",
            "images",
            "import",
            "/data/busybox.tar",
        ]);
        let mut pod = PodSpec::new("web").host_network().config;
        pod.log_directory = "/data".to_owned();
        let calls = self.calls();
        let id = calls.run_pod(&pod, HANDLER).unwrap();
        let container = calls
            .create((&id, &pod), "app", image::BUSYBOX, &["sleep", "3600"], &[])
            .unwrap();
        calls.start(&container).unwrap();
        assert_eq!(self.node.processes_named("sleep").len(), 1);
        // In this pod only the shim is ours, and runs from where the installer has put the binary.
        let shims = self.node.processes_named("containerd-shim");
        let [shim] = &shims[..] else {
            panic!("{shims:?}")
        };
        let program = fs::read_link(format!("/proc/{}/exe", shim.pid)).unwrap();
        assert_eq!(program, Path::new(INSTALLED));

        let (good, said) = self.ours("uninstall");
        assert!(
            !good && said.contains("1 shims serve on this node"),
            "{said}"
        );
        calls.stop_pod(&id).unwrap();
        calls.remove_pod(&id).unwrap();
    }
}

/// Configurations as people have them, for this containerd.
fn configurations(version: Version) -> Vec<Vec<(&'static str, String)>> {
    let v1 = "# ours\nversion = 2\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    restrict_oom_score_adj = true # no capability here\n";
    let v3 = "version = 3 # migrated\n\n[plugins.'io.containerd.cri.v1.runtime']\n  restrict_oom_score_adj = true\n";
    let runc = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n\
                [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\n  NoNewKeyring = true";
    let imports = "imports = [\n  '/etc/containerd/own*.toml', # ours\n]\n";
    if version < Version::V2_0 {
        vec![
            vec![("config.toml", v1.to_owned())],
            vec![],
            vec![("config.toml", format!("{v1}{runc}"))],
            vec![
                ("config.toml", format!("{imports}{v1}")),
                ("own.toml", format!("{v1}{runc}\n")),
            ],
            vec![(
                "config.toml",
                "[plugins.cri]\r\n  restrict_oom_score_adj = true\r\n".to_owned(),
            )],
        ]
    } else {
        vec![
            vec![("config.toml", v3.to_owned())],
            vec![],
            vec![("config.toml", format!("{v1}{runc}"))],
            vec![
                ("config.toml", format!("{imports}{v3}")),
                ("own.toml", v3.to_owned()),
            ],
            vec![("config.toml", v3.replace('\n', "\r\n"))],
        ]
    }
}

macro_rules! machine {
    ($version:expr) => {{
        ours_only!("the stock shim installs nothing");
        match Machine::boot($version) {
            Ok(machine) => machine,
            Err(why) => left_out!(&format!("no node with systemd can be made here: {why}")),
        }
    }};
}

on_every_containerd! {
    fn a_node_gets_the_handler_and_loses_it_again(version) {
        let machine = machine!(version);
        for (number, files) in configurations(version).into_iter().enumerate() {
            machine.configure(&files);
            let (before, first) = (machine.files(), machine.containerd());
            assert!(machine.does("install").contains("has the handler pause"));
            let second = machine.containerd();
            assert_ne!(first, second, "containerd was restarted");
            let installed = machine.files();
            assert!(machine.does("install").contains("nothing to do"));
            assert_eq!((machine.containerd(), machine.files()), (second, installed));
            if number == 0 {
                machine.runs_a_pod();
            }
            machine.does("uninstall");
            assert_eq!(machine.files(), before, "{files:?}");
            machine.containerd();
            assert!(machine.does("uninstall").contains("nothing of the shim's"));
        }
    }

    fn a_containerd_that_does_not_come_up_gets_its_files_back(version) {
        let machine = machine!(version);
        machine.configure(&configurations(version)[0]);
        let before = machine.files();
        machine.node.run(&["touch", "/data/dislikes"]);
        let (good, said) = machine.ours("install");
        assert!(!good && said.contains("The node is as before"), "{said}");
        let pid = machine.containerd();
        machine.node.run(&["test", "-e", &format!("{STATE}/failed")]);
        // A pod that fails is started again: containerd is not.
        let (good, said) = machine.ours("install");
        assert!(!good && said.contains("has failed before"), "{said}");
        assert_eq!(machine.containerd(), pid);
        machine.node.run(&["rm", &format!("{STATE}/failed"), "/data/dislikes"]);
        machine.node.run(&["rmdir", STATE]);
        assert_eq!(machine.files(), before);

        // The same the other way: a containerd that does not start without the handler.
        machine.does("install");
        let (pid, installed) = (machine.containerd(), machine.files());
        machine.node.run(&["touch", "/data/wants"]);
        let (good, said) = machine.ours("uninstall");
        assert!(!good && said.contains("The node is as before"), "{said}");
        assert_ne!(machine.containerd(), pid);
        let pid = machine.containerd();
        let (good, said) = machine.ours("uninstall");
        assert!(!good && said.contains("has failed before"), "{said}");
        machine.node.run(&["rm", &format!("{STATE}/failed"), "/data/wants"]);
        machine.node.run(&["rmdir", STATE]);
        assert_eq!((machine.containerd(), machine.files()), (pid, installed));
        machine.does("uninstall");
        let pid = machine.containerd();
        assert_eq!(machine.files(), before);

        // A restart that is due for another reason is not ours to make.
        machine.node.run(&["touch", "-d", "+1 hour", "/etc/containerd/config.toml"]);
        let (good, said) = machine.ours("install");
        assert!(!good && said.contains("restart containerd yourself"), "{said}");
        machine.node.run(&["touch", "-d", "-1 hour", "/etc/containerd/config.toml"]);
        // What containerd refuses to read is refused, and nothing is changed.
        let files = machine.files();
        machine.node.run(&["sh", "-c", "cp -p /etc/containerd/config.toml /data/kept; echo '[x' >>/etc/containerd/config.toml"]);
        let (good, _) = machine.ours("install");
        assert!(!good);
        machine.node.run(&["cp", "-p", "/data/kept", "/etc/containerd/config.toml"]);
        // What has restarted nothing is not remembered.
        machine.node.run(&["mount", "-t", "tmpfs", "-o", "ro", "none", "/usr/local/bin"]);
        let (good, said) = machine.ours("install");
        assert!(!good && said.contains("The node is as before"), "{said}");
        machine.node.run(&["umount", "/usr/local/bin"]);
        // Without a way to see CRI come up, containerd is not restarted: not the first time, and not the second.
        machine.node.run(&["mv", "/data/bin/ctr", "/data/ctr"]);
        for _ in 0..2 {
            let (good, said) = machine.ours("install");
            assert!(!good && said.contains("ctr"), "{said}");
        }
        machine.node.run(&["mv", "/data/ctr", "/data/bin/ctr"]);
        assert_eq!((machine.containerd(), machine.files()), (pid, files));
        machine.does("install");
    }
}

on_the_newest_containerd! {
    fn systemd_repairs_a_node_whose_installer_is_killed(version) {
        let machine = machine!(version);
        machine.configure(&configurations(version)[0]);
        let before = machine.files();
        machine.node.run(&["touch", "/data/hangs"]);
        machine.node.run(&["systemd-run", "--unit=installer", OURS, "install"]);
        eventually(Duration::from_secs(20), || {
            ok_if(!machine.node.processes_named("sleep").is_empty(), || "no restart yet".to_owned())
        });
        // As a pod that is deleted.
        machine.node.run(&["systemctl", "kill", "--signal=TERM", "installer"]);
        machine.node.run(&["systemctl", "is-active", "installer"]);
        machine.node.run(&["systemctl", "kill", "--signal=KILL", "installer"]);
        eventually(Duration::from_secs(60), || {
            let (answers, _) = machine.node.try_run(&["ctr", "version"]);
            let (at_work, _) = machine.node.try_run(&["test", "-e", STATE]);
            ok_if(answers && !at_work, || "containerd is down".to_owned())
        });
        assert_eq!(machine.files(), before);

        // The next run may come before the rescue.
        machine.node.run(&["systemctl", "reset-failed", "installer"]);
        machine.node.run(&["systemd-run", "--unit=installer", OURS, "install"]);
        eventually(Duration::from_secs(20), || {
            ok_if(!machine.node.processes_named("sleep").is_empty(), || "no restart yet".to_owned())
        });
        machine.node.run(&["systemctl", "kill", "--signal=KILL", "installer"]);
        machine.node.run(&["rm", "/data/hangs"]);
        machine.does("install");
        let (rescued, units) = machine.node.try_run(&["systemctl", "list-units", "--all", "--no-legend", "*rescue*"]);
        assert!(rescued && !units.contains("pause"), "{units}");
        machine.does("uninstall");
        assert_eq!(machine.files(), before);

        // A reboot takes the timer away, and starts the unit of the boot before containerd.
        machine.node.run(&["touch", "/data/hangs"]);
        machine.node.run(&["systemctl", "reset-failed", "installer"]);
        machine.node.run(&["systemd-run", "--unit=installer", OURS, "install"]);
        eventually(Duration::from_secs(20), || {
            ok_if(!machine.node.processes_named("sleep").is_empty(), || "no restart yet".to_owned())
        });
        machine.node.run(&["systemctl", "stop", "containerd-shim-pause-v2-rescue.timer"]);
        machine.node.run(&["systemctl", "kill", "--signal=KILL", "installer"]);
        machine.node.run(&["systemctl", "stop", "containerd"]);
        assert_ne!(machine.files(), before);
        let boot = "containerd-shim-pause-v2-boot";
        machine.node.run(&["systemctl", "is-enabled", boot]);
        machine.node.run(&["systemctl", "daemon-reload"]);
        machine.node.run(&["systemctl", "start", boot, "containerd"]);
        machine.containerd();
        assert_eq!(machine.files(), before);
        let (left, units) = machine.node.try_run(&["sh", "-c", "ls /etc/systemd/system/*/*pause* /etc/systemd/system/*pause*"]);
        assert!(!left, "{units}");
    }

    fn what_somebody_writes_in_the_middle_stays_and_containerd_comes_up(version) {
        let machine = machine!(version);
        machine.configure(&configurations(version)[0]);
        machine.node.run(&["touch", "/data/hangs"]);
        machine.node.run(&["systemd-run", "--unit=installer", OURS, "install"]);
        eventually(Duration::from_secs(20), || {
            ok_if(!machine.node.processes_named("sleep").is_empty(), || "no restart yet".to_owned())
        });
        let drop_in = "/etc/containerd/conf.d/containerd-shim-pause-v2.toml";
        machine.write(drop_in, "version = 3\n");
        machine.node.run(&["systemctl", "kill", "--signal=KILL", "installer"]);
        eventually(Duration::from_secs(60), || {
            let (answers, _) = machine.node.try_run(&["ctr", "version"]);
            ok_if(answers, || "containerd is down".to_owned())
        });
        // Somebody has to look at the node, and until then no run restarts containerd.
        let pid = machine.containerd();
        for _ in 0..2 {
            let (good, said) = machine.ours("install");
            assert!(!good && said.contains("changed by somebody else"), "{said}");
        }
        assert_eq!(machine.containerd(), pid);
        machine.node.run(&["rm", "-r", "/data/hangs", drop_in, &format!("{STATE}/journal")]);
        machine.does("install");
    }

    fn a_file_that_is_imported_and_not_read_yet_is_not_ours_to_try(version) {
        let machine = machine!(version);
        let main = format!("imports = ['conf.d/*.toml']\n{}", configurations(version)[0][0].1);
        machine.configure(&[("config.toml", main)]);
        machine.node.run(&["mkdir", "/etc/containerd/conf.d"]);
        machine.write("/etc/containerd/conf.d/other.toml", "version = 3\n");
        machine.node.run(&["touch", "-d", "+1 hour", "/etc/containerd/conf.d/other.toml"]);
        let (files, pid) = (machine.files(), machine.containerd());
        let (good, said) = machine.ours("install");
        assert!(!good && said.contains("other.toml was changed since containerd started"), "{said}");
        assert_eq!((machine.containerd(), machine.files()), (pid, files));
    }

    fn the_installers_image_installs_from_a_container(version) {
        let machine = machine!(version);
        machine.configure(&configurations(version)[0]);
        let shim = fs::read(ShimUnderTest::Pause.binary(version)).unwrap();
        let image = oci::installer_image("shim-tests.local/installer:1", &shim).unwrap();
        fs::write(machine.node.data().join("installer.tar"), image).unwrap();
        machine.node.run(&["ctr", "images", "import", "/data/installer.tar"]);
        let before = machine.containerd();
        // As the DaemonSet's pod: privileged, and with the node's processes. With runc itself: a privileged spec allows its
        // devices in `resources` alone.
        machine.node.run(&[
            "ctr", "run", "--detach", "--privileged", "--with-ns", "pid:/proc/1/ns/pid", "--cpu-shares", "0",
            "--runc-binary", "/data/bin/runc.real",
            "shim-tests.local/installer:1", "installer", "/containerd-shim-pause-v2", "install",
        ]);
        eventually(Duration::from_secs(30), || {
            let (_, tasks) = machine.node.try_run(&["ctr", "tasks", "ls"]);
            ok_if(tasks.contains("STOPPED"), || tasks)
        });
        assert_ne!(machine.containerd(), before);
        assert!(machine.does("install").contains("nothing to do"));
        assert_eq!(fs::read(machine.node.seen(INSTALLED)).unwrap(), shim);
    }
}
