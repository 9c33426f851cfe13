//! What the events of a container must be: their order, and that there is one for each call that changed something.

use std::collections::BTreeMap;

use crate::receiver::Event;
use crate::tasks::Program;

/// How many calls of each kind succeeded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) created: usize,
    pub(crate) started: usize,
    pub(crate) added: usize,
    pub(crate) execs_started: usize,
    pub(crate) paused: usize,
    pub(crate) resumed: usize,
    pub(crate) deleted: usize,
}

impl Tally {
    fn of(events: &[Event]) -> Self {
        let count = |like: fn(&Event) -> bool| events.iter().filter(|event| like(event)).count();
        Self {
            created: count(|event| *event == Event::Create),
            started: count(|event| matches!(event, Event::Start(_))),
            added: count(|event| matches!(event, Event::ExecAdded(_))),
            execs_started: count(|event| matches!(event, Event::ExecStarted(..))),
            paused: count(|event| *event == Event::Paused),
            resumed: count(|event| *event == Event::Resumed),
            deleted: count(|event| matches!(event, Event::Delete(_))),
        }
    }
}

/// The life of one container, as the events tell it.
#[derive(Default)]
struct Life {
    /// The init's pid, once it is started.
    started: Option<u32>,
    frozen: bool,
    exited: Option<u32>,
    /// The pid of each exec that runs; none before its start.
    execs: BTreeMap<String, Option<u32>>,
}

/// Checks all events of container `id`, which is gone. `undisturbed`: nobody sent a signal, so the exit of an init that
/// runs this program is the program's own.
pub(crate) fn check(
    id: &str,
    events: &[Event],
    calls: &Tally,
    undisturbed: Option<Program>,
) -> Result<(), String> {
    let mut life = None;
    for (at, event) in events.iter().enumerate() {
        life = next(id, life, event, undisturbed)
            .map_err(|why| format!("{id}: event {at}, {event:?}: {why}; all: {events:?}"))?;
    }
    let told = Tally::of(events);
    if life.is_some() || told != *calls {
        return Err(format!(
            "{id}: events {told:?}, calls {calls:?}; all: {events:?}"
        ));
    }
    Ok(())
}

fn next(
    id: &str,
    life: Option<Life>,
    event: &Event,
    undisturbed: Option<Program>,
) -> Result<Option<Life>, &'static str> {
    let ok_if = |condition: bool, why| if condition { Ok(()) } else { Err(why) };
    let Some(mut life) = life else {
        ok_if(*event == Event::Create, "before a creation")?;
        return Ok(Some(Life::default()));
    };
    if let Event::Delete(status) = event {
        ok_if(
            life.exited == Some(*status),
            "a deletion with another status than the exit's",
        )?;
        return Ok(None);
    }
    ok_if(life.exited.is_none(), "after the exit of the init")?;
    match event {
        Event::Start(pid) => {
            ok_if(life.started.is_none() && *pid > 0, "a second start")?;
            life.started = Some(*pid);
        }
        Event::ExecAdded(exec) => {
            ok_if(
                !matches!(life.execs.get(exec), Some(Some(_))),
                "the exec runs",
            )?;
            life.execs.insert(exec.clone(), None);
        }
        Event::ExecStarted(exec, pid) => {
            ok_if(
                life.execs.get(exec) == Some(&None) && *pid > 0,
                "an exec that is not added",
            )?;
            life.execs.insert(exec.clone(), Some(*pid));
        }
        Event::Exit(process, pid, status) if process == id => {
            ok_if(
                life.execs.values().all(Option::is_none),
                "an exec still runs",
            )?;
            ok_if(
                life.started.is_none_or(|started| started == *pid),
                "another pid",
            )?;
            let own = undisturbed.filter(|_| life.started.is_some());
            let own = own.and_then(Program::exit_code).map(u32::from);
            ok_if(
                own.is_none_or(|own| own == *status),
                "not the program's own code",
            )?;
            life.exited = Some(*status);
        }
        Event::Exit(exec, pid, _) => {
            ok_if(
                life.execs.remove(exec) == Some(Some(*pid)),
                "no such exec runs",
            )?;
        }
        Event::Paused => ok_if(!std::mem::replace(&mut life.frozen, true), "paused twice")?,
        Event::Resumed => ok_if(std::mem::replace(&mut life.frozen, false), "not paused")?,
        Event::Create | Event::Delete(_) => return Err("a second creation"),
        Event::Other(_) => return Err("not expected here"),
    }
    Ok(Some(life))
}
