//! The program of `make kind`, with stand-ins for docker, kind and kubectl: that what is missing is named, that a wrong
//! answer ends the program, and that the cluster is deleted in every case. No cluster is made here.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output};

use shim_tests::{lab, ours_only};
use tempfile::TempDir;

/// Answers as docker, kind and kubectl do, and writes each call into the file `calls`. What a test wants wrong is the name
/// of a file beside.
const STAND_IN: &str = r#"#!/bin/sh
here=$(dirname "$0")
tool=$(basename "$0")
[ "$tool" = kubectl ] && [ "$1" = --kubeconfig ] && shift 2
echo "$tool $*" >>"$here/calls"
case "$tool $*" in
  "kind get clusters") [ ! -e "$here/other-cluster" ] || echo pause-v2 ;;
  "kind create cluster "*) [ ! -e "$here/no-image" ] || { echo "failed to pull image kindest/node" >&2; exit 1; } ;;
  "docker exec "*" ps -e "*)
    echo '    1 systemd'
    [ -e "$here/deleted" ] || echo '  200 containerd-shim'
    [ ! -e "$here/stock" ] || echo '  201 pause' ;;
  "docker exec "*" ps -o ppid= "*) echo '  200' ;;
  "docker exec "*" ps -o pid=,comm= "*) printf '  301 nginx\n  302 pause\n' ;;
  "docker exec "*smaps_rollup) printf '55-56 ---p 00 00:00 0 [rollup]\nRss: 900 kB\nPrivate_Clean: 4 kB\nPrivate_Dirty: 300 kB\n' ;;
  "docker exec "*" crictl inspect "*) echo 301 ;;
  "docker exec "*" lsns "*) printf 'NS TYPE NPROCS COMMAND\n1 net 2 nginx\n2 ipc 2 nginx\n3 uts 2 nginx\n' ;;
  "kubectl get pod "*)
    count=0; [ ! -e "$here/stopped" ] || count=1
    printf '{"status":{"podIP":"10.244.1.2","containerStatuses":[{"restartCount":%s,"containerID":"containerd://ab"}]}}' $count ;;
  "kubectl exec "*" hostname -i") echo 10.244.1.2 ;;
  "kubectl exec "*" readlink "*) printf 'net:[1]\nipc:[2]\nuts:[3]\n' ;;
  "kubectl exec "*" curl "*) echo '<title>Welcome to nginx!</title>' ;;
  "kubectl exec "*" nginx -s stop") touch "$here/stopped" ;;
  "kubectl exec shared "*" ps "*) printf '1 /pause\n7 nginx: master process nginx\n9 sleep infinity\n' ;;
  "kubectl exec shared "*" cat /proc/1/comm") echo pause ;;
  "kubectl exec "*" echo works") echo works ;;
  "kubectl apply --filename config/web.yaml")
    mkdir "$here/www"
    echo 'Welcome to nginx!' >"$here/www/index.html"
    for port in 31000 31001; do "$here/busybox" httpd -p $port -h "$here/www"; done ;;
  "kubectl delete --wait --filename="*) touch "$here/deleted" ;;
esac
"#;

fn program(folder: &Path, name: &str, script: &str) {
    let path = folder.join(name);
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A folder with the stand-ins.
fn stand_ins() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    program(folder.path(), "stand-in", STAND_IN);
    for tool in ["docker", "kind", "kubectl"] {
        symlink("stand-in", folder.path().join(tool)).unwrap();
    }
    let busybox = lab::lab().join("rootfs/busybox");
    symlink(busybox, folder.path().join("busybox")).unwrap();
    folder
}

/// Runs the program in network and pid namespaces of its own: the ports are fixed, and the servers end with the program.
fn run(tools: &Path) -> (Output, String) {
    let output = Command::new("unshare")
        .args(["--net", "--pid", "--fork", "--kill-child", "--"])
        .args(["sh", "-euc", "ip link set lo up; PATH=$0; exec \"$1\""])
        .arg(format!("{}:/usr/bin:/bin", tools.display()))
        .arg(lab::helper("kind"))
        .env_remove("KEEP")
        .output()
        .unwrap();
    let calls = fs::read_to_string(tools.join("calls")).unwrap_or_default();
    (output, calls)
}

/// What was said, without the line breaks of the screen.
fn text(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[track_caller]
fn assert_last_call(calls: &str, begin: &str) {
    assert!(calls.lines().last().unwrap().starts_with(begin), "{calls}");
}

#[test]
fn the_story_is_shown_and_the_cluster_deleted() {
    ours_only!("the program shows this shim");
    let tools = stand_ins();
    let (output, calls) = run(tools.path());
    let shown = text(&output.stdout);
    assert!(output.status.success(), "{shown}\n{}", text(&output.stderr));
    for line in [
        "10.244.1.2",
        "NodePorts",
        "private memory of them",
        "608 kB",
        "the cluster is deleted",
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    assert_last_call(&calls, "kind delete cluster --name pause-v2 ");
}

#[test]
fn a_pause_container_ends_the_story_and_the_cluster() {
    ours_only!("the program shows this shim");
    let tools = stand_ins();
    fs::write(tools.path().join("stock"), "").unwrap();
    let (output, calls) = run(tools.path());
    let errors = text(&output.stderr);
    assert!(!output.status.success());
    assert!(errors.contains("1 processes named pause"), "{errors}");
    assert_last_call(&calls, "kind delete cluster ");
}

#[test]
fn what_is_missing_is_named_with_how_to_get_it() {
    ours_only!("the program shows this shim");
    let tools = stand_ins();
    fs::remove_file(tools.path().join("kind")).unwrap();
    fs::remove_file(tools.path().join("docker")).unwrap();
    let docker = "#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2; exit 1\n";
    program(tools.path(), "docker", docker);
    let (output, calls) = run(tools.path());
    let errors = text(&output.stderr);
    assert!(!output.status.success());
    for words in [
        "Cannot connect to the Docker daemon",
        "apt-get install docker.io",
        "apt-get install kind",
    ] {
        assert!(errors.contains(words), "{words}: {errors}");
    }
    assert!(!calls.contains("create"), "{calls}");
}

#[test]
fn a_cluster_of_somebody_else_is_left_alone() {
    ours_only!("the program shows this shim");
    let tools = stand_ins();
    fs::write(tools.path().join("other-cluster"), "").unwrap();
    let (output, calls) = run(tools.path());
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("does not delete what others made"));
    assert!(
        !calls.contains("create") && !calls.contains("delete"),
        "{calls}"
    );
}

#[test]
fn a_failed_creation_leaves_no_nodes_and_says_how_to_get_the_image() {
    ours_only!("the program shows this shim");
    let tools = stand_ins();
    fs::write(tools.path().join("no-image"), "").unwrap();
    let (output, calls) = run(tools.path());
    let errors = text(&output.stderr);
    assert!(!output.status.success());
    assert!(
        errors.contains("failed to pull image") && errors.contains("docker load"),
        "{errors}"
    );
    assert_last_call(&calls, "kind delete cluster ");
}
