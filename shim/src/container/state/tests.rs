#![allow(clippy::panic)]
use super::*;

fn end(status: u32) -> End {
    End {
        exit: Exit::now(status),
        output: Output::Delivered,
    }
}

fn unread() -> End {
    End {
        exit: Exit::now(0),
        output: Output::BeingRead(Arc::default()),
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
        Status::Ended(Exit::now(0)),
        Status::Stopped(Exit::now(0)),
    ];
    for (call, fits) in [
        (Call::Start, [true, false, false, false, false]),
        (Call::Delete, [true, false, false, true, true]),
        (Call::Pause, [false, true, false, false, false]),
        (Call::Exec, [true, true, false, false, false]),
        (Call::Checkpoint, [false, true, true, false, false]),
        (Call::Resume, [false, false, true, false, false]),
        (Call::Update, [true, true, true, false, false]),
        (Call::Kill, [true, true, true, false, false]),
    ] {
        for (state, fits) in states.into_iter().zip(fits) {
            assert_eq!(state.check(call).is_ok(), fits, "{call:?} in {state:?}");
        }
    }
}

#[test]
fn a_kill_of_the_dead_is_not_found_and_all_else_a_failed_precondition() {
    let dead = Status::Stopped(Exit::now(0));
    assert!(matches!(dead.check(Call::Kill), Err(Error::NotFound(_))));
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
            Life::Stopped(Exit::now(1)),
        ]
    };
    // For each life: whether an exec in this state holds back the exit of its init.
    let holds_the_init_back = [false, true, true, true, true, false];
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
            let exit = exit_to_publish(&init, Whose::Init(&[exec], checkpointing));
            assert_eq!(
                exit.is_some(),
                published,
                "{init:?} with {exec:?}, {checkpointing:?}"
            );
        }
    }
    for (exec, published) in lives()
        .iter()
        .zip([false, false, false, false, true, false])
    {
        assert_eq!(
            exit_to_publish(exec, Whose::Exec).is_some(),
            published,
            "{exec:?}"
        );
    }
}

#[test]
fn an_exit_in_the_middle_of_a_start_is_seen_at_once_and_published_after_the_start() {
    let life = starting().ended(end(3));
    assert!(matches!(life.status(), Status::Ended(exit) if exit.status == 3));
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
fn who_starts_a_process_hears_of_its_end() {
    let (ending, mut ended) = oneshot::channel::<()>();
    let life = Life::Starting(Start {
        ending: Some(ending),
        ..Start::default()
    });
    assert!(ended.try_recv() == Err(oneshot::error::TryRecvError::Empty));
    let life = life.ended(unread());
    assert!(ended.try_recv() == Err(oneshot::error::TryRecvError::Closed));
    let (life, _) = life.delivered().started();
    assert!(exit_to_publish(&life, Whose::Exec).is_some());
}
