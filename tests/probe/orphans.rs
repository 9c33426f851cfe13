//! Processes that lose their parents, and the processes in /proc.

use std::fs;
use std::io;

/// Makes `count` processes that end after their parent: PID 1 must reap them.
pub(crate) fn make(count: i32) -> io::Result<String> {
    let mut left = count;
    while left > 0 {
        let batch = left.min(500);
        left -= batch;
        // SAFETY: this program has one thread here, the children call only async-signal-safe functions, and the
        // pointers are to live values.
        unsafe {
            let middle = libc::fork();
            if middle < 0 {
                return Err(io::Error::last_os_error());
            }
            if middle == 0 {
                let mut pipe = [0; 2];
                if libc::pipe(pipe.as_mut_ptr()) != 0 {
                    libc::_exit(1);
                }
                for _ in 0..batch {
                    let child = libc::fork();
                    if child < 0 {
                        libc::_exit(1);
                    }
                    if child == 0 {
                        // End of file comes when the parent is gone: only the parent has the writing end.
                        libc::close(pipe[1]);
                        let mut byte = 0_u8;
                        libc::read(pipe[0], (&raw mut byte).cast(), 1);
                        libc::_exit(7);
                    }
                }
                libc::_exit(0);
            }
            let mut status = 0;
            libc::waitpid(middle, &raw mut status, 0);
            if status != 0 {
                return Err(io::Error::other("fork failed in the middle process"));
            }
        }
    }
    Ok(String::new())
}

struct Shown {
    pid: i32,
    state: char,
    name: String,
}

fn shown() -> Vec<Shown> {
    let mut all: Vec<Shown> = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            let (open, close) = (stat.find('(')?, stat.rfind(')')?);
            let state = stat[close + 1..].trim_start().chars().next()?;
            Some(Shown {
                pid,
                state,
                name: stat[open + 1..close].to_owned(),
            })
        })
        .collect();
    all.sort_by_key(|process| process.pid);
    all
}

/// The number of zombies, and the number of processes.
pub(crate) fn zombies() -> String {
    let all = shown();
    let zombies = all.iter().filter(|process| process.state == 'Z').count();
    format!("{zombies} {}", all.len())
}

/// `PID NAME` of each.
pub(crate) fn pids() -> String {
    shown()
        .iter()
        .map(|process| format!("{} {}", process.pid, process.name))
        .collect::<Vec<_>>()
        .join("\n")
}
