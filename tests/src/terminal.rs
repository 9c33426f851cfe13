//! A program on a terminal of its own, for `ctr -t`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::until::{eventually, ok_if};

/// The program and the master end of its terminal.
pub struct Terminal {
    child: Child,
    master: File,
    output: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    /// Starts `command` on a new terminal of 24 rows and 80 columns.
    pub fn start(mut command: Command) -> Self {
        let master: OwnedFd = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = open(
            &name,
            OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .unwrap();
        let slave = File::from(slave);
        command
            .stdin(slave.try_clone().unwrap())
            .stdout(slave.try_clone().unwrap())
            .stderr(slave);
        let master = File::from(master);
        resize(&master, 24, 80);
        let child = command.spawn().unwrap();
        // `command` holds copies of the terminal's slave end.
        drop(command);
        let output = Arc::new(Mutex::new(Vec::new()));
        let (into, mut from) = (Arc::clone(&output), master.try_clone().unwrap());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // A read fails with EIO when the last process has closed the slave end.
            while let Ok(length @ 1..) = from.read(&mut bytes) {
                into.lock().unwrap().extend_from_slice(&bytes[..length]);
            }
        });
        Self {
            child,
            master,
            output,
        }
    }

    /// All that the program has printed.
    pub fn printed(&self) -> String {
        String::from_utf8_lossy(&self.output.lock().unwrap()).into_owned()
    }

    /// Waits until the program has printed `text`.
    #[track_caller]
    pub fn expect(&self, text: &str) {
        eventually(Duration::from_secs(10), || {
            let printed = self.printed();
            ok_if(printed.contains(text), || {
                format!("{text:?} is not in {printed:?}")
            })
        });
    }

    /// Types `text`.
    pub fn enter(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    /// Changes the window's size, and sends SIGWINCH as the kernel does to a foreground process.
    pub fn resize(&self, rows: u16, columns: u16) {
        resize(&self.master, rows, columns);
        crate::proc::kill(self.child.id().cast_signed(), Signal::WINCH);
    }

    /// Waits for the program's end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        eventually(Duration::from_secs(10), || {
            self.child
                .try_wait()
                .unwrap()
                .ok_or_else(|| format!("still runs; printed {:?}", self.printed()))
        })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn resize(master: &File, rows: u16, columns: u16) {
    tcsetwinsize(
        master,
        Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        },
    )
    .unwrap();
}
