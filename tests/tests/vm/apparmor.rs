//! AppArmor: a container's output arrives whatever its profile says about files.

use std::fs::{self, File};
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use shim_tests::calls::{Shim, Streams};
use shim_tests::raw::Bundle;
use shim_tests::until::ok_if;
use shim_tests::{Daemon, eventually, on_every_containerd};

/// Where `image.sh` puts the parser.
const PARSER: &str = "/usr/lib/apparmor/apparmor_parser";

/// Name, flags and rules of profiles: as containerd's own, as the example of Kubernetes' documentation, and one that
/// does not find a file of another mount namespace.
const PROFILES: [[&str; 3]; 3] = [
    [
        "cri-containerd.apparmor.d",
        "attach_disconnected,mediate_deleted",
        "capability, network, umount, file, deny /sys/[^f]*/** wklx,",
    ],
    [
        "tests-deny-write",
        "attach_disconnected",
        "file, deny /** w,",
    ],
    ["tests-files", "mediate_deleted", "capability, file,"],
];

fn load(profile: [&str; 3]) {
    let [name, flags, rules] = profile;
    let mut parser = Command::new(PARSER)
        .args(["--replace", "--skip-cache"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let text = format!("profile {name} flags=({flags}) {{ {rules} }}\n");
    let mut input = parser.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    assert!(parser.wait().unwrap().success(), "{text}");
}

on_every_containerd! {
    fn apparmor_output_arrives_whatever_the_profile_says_about_files(version) {
        let daemon = Daemon::start(version);
        let folder = daemon.directory().join("streams");
        fs::create_dir_all(&folder).unwrap();
        for profile in PROFILES {
            load(profile);
            let out = folder.join(profile[0]);
            mknodat(CWD, &out, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
            let bundle = Bundle::new(&daemon, profile[0]);
            let script = "cat /proc/self/attr/current; echo again > /dev/stdout";
            let mut spec = bundle.spec_with_dev(&["sh", "-c", script], false);
            spec["process"]["apparmorProfile"] = profile[0].into();
            let bundle = bundle.write_spec(&spec);
            let shim = Shim::connect(&bundle.start(b""));
            let stdout = out.to_str().unwrap().to_owned();
            // As containerd does, and so that the read does not wait: both ends at first, then the reader's alone.
            let both = File::options().read(true).write(true).open(&out).unwrap();
            let reader = File::open(&out).unwrap();
            bundle.create_with(&shim, &Streams { stdout, ..Streams::default() }).unwrap();
            drop(both);
            shim.start(&bundle.id, "").unwrap();
            let read = std::thread::spawn(move || std::io::read_to_string(reader));
            assert_eq!(shim.wait(&bundle.id, ""), Ok(0), "{}", profile[0]);
            shim.delete(&bundle.id, "").unwrap();
            eventually(Duration::from_secs(5), || ok_if(read.is_finished(), || "no end".to_owned()));
            let expected = format!("{} (enforce)\nagain\n", profile[0]);
            assert_eq!(read.join().unwrap().unwrap(), expected);
            bundle.shut_down(&shim);
        }
        fs::remove_dir_all(&folder).unwrap();
        daemon.end();
    }
}
