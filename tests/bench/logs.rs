//! What a container's output costs the shim.

use std::fs;
use std::time::Duration;

use shim_tests::cri::Failure;
use shim_tests::proc::{self, Process};
use shim_tests::slot::text;
use shim_tests::until::within;
use shim_tests::{image, lab};

use crate::columns::{Column, in_turn};
use crate::node::{CniOrHost, Node};

/// So long may it take for each MiB.
const PER_MIB: Duration = Duration::from_millis(500);

pub(crate) fn run(node: &Node, columns: &mut [Column], network: CniOrHost, mib: usize) {
    let probe = text(&lab::probe());
    let folder = node.daemon.directory().join("flood");
    fs::create_dir_all(&folder).unwrap();
    // The flood waits for this in its middle.
    fs::write(folder.join("go"), "").unwrap();
    let folder = text(&folder);
    in_turn(node, columns, "logs", network, 1, |column, _| {
        let calls = &node.calls;
        let config = node.pod(network);
        let pod = calls.run_pod(&config, column.shim.name())?;
        let command = [probe.as_str(), "flood", &mib.to_string(), &folder];
        let mounts = [probe.as_str(), &folder];
        let app = calls.create((&pod, &config), "flood", image::BUSYBOX, &command, &mounts)?;
        let shims = node.shims();
        let before = cpu(&shims);
        calls.start(&app)?;
        let deadline = PER_MIB * u32::try_from(mib).unwrap() + Duration::from_secs(10);
        let code = within(deadline, || {
            std::thread::sleep(Duration::from_millis(100));
            match calls.exit_code(&app) {
                Ok(Some(code)) => Ok(code),
                Ok(None) => Err("the flood does not end".to_owned()),
                Err(failure) => Err(failure.0),
            }
        });
        let code = code.map_err(Failure)?;
        if !shims.iter().all(Process::alive) {
            return Err(Failure("the shim has ended".to_owned()));
        }
        let after = cpu(&shims);
        if code != 0 {
            return Err(Failure(format!("the flood ended with {code}")));
        }
        column.add(
            &format!("logs {mib} MiB: CPU of the shim"),
            "s",
            (after - before).as_secs_f64(),
        );
        calls.stop_pod(&pod)?;
        calls.remove_pod(&pod)?;
        let _ = fs::remove_dir_all(&config.log_directory);
        node.settle()
    });
}

/// CPU time that these processes themselves have used.
fn cpu(processes: &[Process]) -> Duration {
    let of_all = processes.iter().map(|one| proc::cpu_time(one.pid));
    of_all.sum()
}
