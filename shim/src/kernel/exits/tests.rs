#![allow(clippy::unwrap_used)]
use super::*;

fn pid(number: i32) -> Pid {
    Pid::from_raw(number).unwrap()
}

#[test]
fn an_exit_before_its_pid_is_known_is_kept() {
    let exits = Arc::new(Exits::default());
    let _expected = exits.expect();
    exits.books().ended(pid(7), Exit::now(3));
    assert_eq!(exits.claim(pid(7)).exit.try_recv().unwrap().status, 3);
}

#[test]
fn an_exit_is_handed_to_who_claimed_the_pid() {
    let exits = Arc::new(Exits::default());
    let mut claim = exits.claim(pid(7));
    assert!(claim.exit.try_recv().is_err());
    exits.books().ended(pid(8), Exit::now(1));
    exits.books().ended(pid(7), Exit::now(2));
    assert_eq!(claim.exit.try_recv().unwrap().status, 2);
}

#[test]
fn an_orphan_is_forgotten_when_nobody_expects_anything() {
    let exits = Arc::new(Exits::default());
    let first = exits.expect();
    let second = exits.expect();
    exits.books().ended(pid(7), Exit::now(1));
    drop(first);
    assert_eq!(exits.books().unclaimed.len(), 1);
    drop(second);
    assert_eq!(exits.books().unclaimed.len(), 0);
    exits.books().ended(pid(8), Exit::now(1));
    assert_eq!(exits.books().unclaimed.len(), 0);
}

#[test]
fn what_only_ended_calls_could_claim_is_forgotten_while_others_run() {
    let exits = Arc::new(Exits::default());
    let first = exits.expect();
    exits.books().ended(pid(7), Exit::now(1));
    let second = exits.expect();
    exits.books().ended(pid(8), Exit::now(2));
    drop(first);
    let _third = exits.expect();
    assert!(!exits.books().unclaimed.contains_key(&pid(7)));
    assert!(exits.books().unclaimed.contains_key(&pid(8)));
    drop(second);
    assert!(exits.books().unclaimed.is_empty());
}

#[test]
fn the_exit_of_an_earlier_process_with_the_same_pid_is_not_taken() {
    let exits = Arc::new(Exits::default());
    let _expected = exits.expect();
    let mut child = Command::new("sleep").arg("60").spawn().unwrap();
    let pid = Pid::from_child(&child);
    exits.books().ended(pid, Exit::now(1));
    let mut claim = exits.claim(pid);
    assert!(claim.exit.try_recv().is_err());
    child.kill().unwrap();
    child.wait().unwrap();
    exits.books().ended(pid, Exit::now(137));
    assert_eq!(claim.exit.try_recv().unwrap().status, 137);
}

#[tokio::test]
async fn children_are_reaped_with_their_codes_and_signals() {
    let exits = Exits::watch().unwrap();
    for (script, status) in [("exit 7", 7), ("kill -9 $$", 137)] {
        let claim = exits
            .spawn(Command::new("/bin/sh").args(["-c", script]))
            .unwrap();
        assert_eq!(claim.exit.await.unwrap().status, status);
    }
}

#[tokio::test]
async fn only_a_process_that_has_not_been_reaped_takes_a_signal() {
    let exits = Exits::watch().unwrap();
    let claim = exits.spawn(Command::new("sleep").arg("60")).unwrap();
    claim.child.signal(Signal::KILL).unwrap();
    assert_eq!(claim.exit.await.unwrap().status, 137);
    assert_eq!(claim.child.signal(Signal::KILL), Err(Errno::SRCH));
}

#[test]
fn a_signal_reaches_no_later_process_with_the_same_pid() {
    let exits = Arc::new(Exits::default());
    let first = exits.claim(pid(7));
    exits.books().ended(pid(7), Exit::now(1));
    let _second = exits.claim(pid(7));
    assert_eq!(first.child.signal(Signal::KILL), Err(Errno::SRCH));
}

#[test]
fn a_pending_kill_is_found_in_either_mask() {
    let status = |own: &str, shared: &str| format!("Name:\tx\nSigPnd:\t{own}\nShdPnd:\t{shared}\n");
    assert!(has_kill_pending(&status(
        "0000000000000100",
        "0000000000000000"
    )));
    assert!(has_kill_pending(&status(
        "0000000000000000",
        "0000000000004100"
    )));
    assert!(!has_kill_pending(&status(
        "0000000000000200",
        "0000000000004000"
    )));
    assert!(!has_kill_pending(""));
}
