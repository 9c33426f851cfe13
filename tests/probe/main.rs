//! Helpers of the tests for use inside a container, on a terminal, or beside a test, in one static program without a
//! shell: System V IPC, POSIX message queues, orphans by the thousand, an attacker's look at another process, a
//! terminal's size, the guard of a test.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a command line tool of the tests"
)]

mod attack;
mod fetch;
mod ipc;
mod logger;
mod orphans;
mod winsize;

use std::process::exit;

const USAGE: &str = "probe COMMAND
  guard SLOT               take a test's slot down when stdin closes without `done`
  shm-create KEY TEXT      System V shared memory with this text          shm-read KEY
  sem-create KEY VALUE     a System V semaphore                           sem-read KEY
  mq-send NAME TEXT        a POSIX message queue with one message         mq-receive NAME
  orphans N                make N processes that lose their parent and end
  zombies                  print the number of zombies that /proc shows
  attack PID               read and write PID as far as the kernel allows; print what worked
  pids                     print `PID NAME` of everything that /proc shows
  fetch HOST               GET / by HTTP from port 80; HOST is an address or a name in /etc/hosts
  flood MIB FOLDER         write so much to stdout, with a pause in the middle (see shim_tests::flood)
  logger FOLDER            be a logger as binary:// has it; FOLDER/mode says of what kind
  spray N                  write N numbered lines to stdout and to stderr
  winsize                  print the terminal's rows and columns at each SIGWINCH; end at end of input";

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[1..] {
        ["guard", slot] => {
            shim_tests::takedown::guard_main(slot.parse().expect("a slot's number"));
            Ok(String::new())
        }
        ["shm-create", key, text] => ipc::shm_create(number(key), text),
        ["shm-read", key] => ipc::shm_read(number(key)),
        ["sem-create", key, value] => ipc::sem_create(number(key), number(value)),
        ["sem-read", key] => ipc::sem_read(number(key)),
        ["mq-send", name, text] => ipc::mq_send(name, text),
        ["mq-receive", name] => ipc::mq_receive(name),
        ["orphans", count] => orphans::make(number(count)),
        ["zombies"] => Ok(orphans::zombies()),
        ["attack", pid] => Ok(attack::attack(number(pid))),
        ["pids"] => Ok(orphans::pids()),
        ["spray", count] => {
            for line in 0..number(count) {
                println!("out {line}");
                eprintln!("err {line}");
            }
            Ok(String::new())
        }
        ["flood", mib, folder] => shim_tests::flood::write(
            mib.parse().expect("a number of MiB"),
            std::path::Path::new(folder),
        )
        .map(|()| String::new()),
        ["logger", folder] => logger::run(folder),
        ["fetch", host] => fetch::fetch(host),
        ["winsize"] => winsize::print(),
        _ => {
            eprintln!("{USAGE}");
            exit(2);
        }
    };
    match result {
        Ok(text) if text.is_empty() => {}
        Ok(text) => println!("{text}"),
        Err(error) => {
            eprintln!("{error}");
            exit(1);
        }
    }
}

fn number(word: &str) -> i32 {
    word.parse()
        .unwrap_or_else(|_| panic!("{word}: not a number"))
}
