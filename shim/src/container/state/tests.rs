#![allow(clippy::panic)]
use super::*;

fn end(status: u32) -> End {
    End {
        exit: Exit::now(status),
        output: Output::Delivered,
        held: false,
    }
}

fn unread() -> End {
    End {
        exit: Exit::now(0),
        output: Output::BeingRead(Arc::default()),
        held: false,
    }
}

fn starting() -> Life {
    Life::Starting(Start::default())
}

#[test]
fn each_call_fits_the_states_it_is_for() {
    let states = [
        Status::Created,
        Status::Running,
        Status::Paused,
        Status::Ending(Exit::now(0)),
        Status::Ended(Exit::now(0)),
        Status::Stopped(Exit::now(0)),
        Status::Failed(Exit::now(255)),
    ];
    for (call, fits) in [
        (Call::Start, "+------"),
        (Call::Delete, "+--++++"),
        (Call::Pause, "-+-----"),
        (Call::Exec, "++-+---"),
        (Call::Checkpoint, "-++----"),
        (Call::Resume, "--+----"),
        (Call::Update, "+++---+"),
        // A Kill of an exec that never ran is refused for want of a process.
        (Call::Kill, "+++---+"),
    ] {
        for (state, fits) in states.into_iter().zip(fits.chars()) {
            assert_eq!(
                state.check(call).is_ok(),
                fits == '+',
                "{call:?} in {state:?}"
            );
        }
    }
}

#[test]
fn a_kill_of_the_dead_is_not_found_and_all_else_a_failed_precondition() {
    let dead = Status::Stopped(Exit::now(0));
    for dead in [
        dead,
        Status::Ending(Exit::now(0)),
        Status::Ended(Exit::now(0)),
    ] {
        assert!(matches!(dead.check(Call::Kill), Err(Error::NotFound(_))));
    }
    for call in [
        Call::Start,
        Call::Pause,
        Call::Resume,
        Call::Exec,
        Call::Update,
        Call::Checkpoint,
    ] {
        assert!(matches!(
            dead.check(call),
            Err(Error::FailedPrecondition(_))
        ));
    }
}

#[test]
fn an_exit_is_published_when_nothing_holds_it_back() {
    use Checkpointing::{No, UnderWay};
    let lives = || {
        [
            Life::Created,
            starting(),
            Life::Running,
            Life::Paused,
            Life::Ended(end(1)),
            Life::Failed(Exit::now(255)),
            Life::Stopped(Exit::now(1)),
        ]
    };
    // For each life: whether an exec in this state holds back the exit of its init.
    let holds_the_init_back = [false, true, true, true, true, false, false];
    for (exec, holds) in lives().iter().zip(holds_the_init_back) {
        for (checkpointing, init, published) in [
            (No, Life::Ended(end(7)), !holds),
            (UnderWay, Life::Ended(end(7)), false),
            (No, Life::Ended(unread()), false),
            (No, starting().ended(end(7)), false),
            (No, Life::Created, false),
            (No, Life::Running, false),
            (No, Life::Stopped(Exit::now(7)), false),
        ] {
            let whose = Whose::Init(&[exec], checkpointing);
            let case = format!("{init:?} with {exec:?}, {checkpointing:?}");
            assert_eq!(exit_to_publish(&init, whose).is_some(), published, "{case}");
            // For State the init runs until only the reader is waited for.
            if matches!(init, Life::Ended(_)) {
                let seen = init.held_back(whose).status();
                let runs = holds || checkpointing == UnderWay;
                assert_eq!(matches!(seen, Status::Ending(_)), runs, "{case}");
                assert_eq!(matches!(seen, Status::Ended(_)), !runs, "{case}");
            }
        }
    }
    for (exec, published) in lives()
        .iter()
        .zip([false, false, false, false, true, false, false])
    {
        assert_eq!(
            exit_to_publish(exec, Whose::Exec).is_some(),
            published,
            "{exec:?}"
        );
    }
}

#[test]
fn an_exit_in_the_middle_of_a_start_is_known_at_once_and_published_after_the_start() {
    let life = starting().ended(end(3));
    assert!(matches!(life.status(), Status::Ending(exit) if exit.status == 3));
    assert!(life.is_starting() && life.has_exit_to_come());
    for (after, waiting) in [
        starting().ended(end(3)).started(),
        starting().ended(end(3)).start_failed(),
    ] {
        assert!(waiting.is_empty());
        let exit = exit_to_publish(&after, Whose::Exec);
        assert_eq!(exit.map(|exit| exit.status), Some(3));
    }
}

#[test]
fn a_start_that_is_over_leaves_the_process_running_or_as_it_was() {
    assert!(matches!(starting().started(), (Life::Running, _)));
    assert!(matches!(starting().start_failed(), (Life::Created, _)));
    // A second end changes nothing.
    let life = Life::Ended(end(1)).ended(end(2));
    assert_eq!(life.unpublished().map(|exit| exit.status), Some(1));
}

#[test]
fn a_wait_for_an_exec_that_could_not_be_started_has_an_end() {
    let failed = Life::Failed(Exit::now(255)).status();
    assert_eq!(failed.published_exit().map(|exit| exit.status), Some(255));
    assert!(failed.exit().is_none());
}

#[test]
fn a_start_is_hurried_by_the_end_of_its_process_and_by_who_asks() {
    let hurried = |hurry: fn(Life) -> Life| {
        let (sender, hurried) = watch::channel(());
        let life = Life::Starting(Start {
            hurry: Some(sender),
            ..Start::default()
        });
        assert!(hurried.has_changed().is_ok());
        let life = hurry(life);
        assert!(hurried.has_changed().is_err());
        life
    };
    let life = hurried(|life| life.ended(unread()));
    let (life, _) = life.delivered().started();
    assert!(exit_to_publish(&life, Whose::Exec).is_some());
    let life = hurried(|mut life| {
        life.hurry();
        life
    });
    assert!(life.is_starting());
}
