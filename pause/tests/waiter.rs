//! Sandboxes beside a waiter for all children, as the shim has one. The test has a file of its own, because its waiter
//! would take the children of other tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::mpsc;

use common::config;
use pause::{IdMap, Namespace, Sandbox, UserNamespace};
use rustix::io::Errno;
use rustix::process::{WaitOptions, wait};

#[test]
fn sandboxes_come_and_go_beside_a_waiter_for_all_children() {
    let (exits, exited) = mpsc::channel();
    std::thread::spawn(move || {
        loop {
            match wait(WaitOptions::empty()) {
                Ok(Some((pid, _))) if exits.send(pid).is_err() => return,
                Ok(_) => {}
                Err(Errno::CHILD) => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        }
    });
    let map = vec![IdMap {
        container: 0,
        host: 300_000,
        size: 65536,
    }];
    let new_user = UserNamespace::New {
        uid_map: map.clone(),
        gid_map: map,
    };
    for round in 0..40 {
        let mut wanted = config();
        wanted.namespaces.pid = Namespace::New;
        if round % 2 == 0 {
            wanted.namespaces.user = new_user.clone();
        }
        if round % 4 < 2 {
            wanted
                .sysctls
                .insert("net.core.somaxconn".to_owned(), "many".to_owned());
            Sandbox::create(&wanted).unwrap_err();
        } else {
            let sandbox = Sandbox::create(&wanted).unwrap();
            let holder = sandbox.pid();
            sandbox.end();
            // The waiter, and nobody else, gets the exit of a holder whose sandbox was made.
            let timeout = std::time::Duration::from_secs(10);
            while exited.recv_timeout(timeout).unwrap() != holder {}
        }
    }
    common::soon(|| common::traces().children.is_empty().then_some(()));
}
