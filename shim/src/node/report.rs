//! The findings of `check`: as lines for a person, as JSON for a program.

use serde_json::{Value, json};

use super::{Form, Said};

/// What a finding means for the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// As it should be.
    Ok,
    /// Pods run; somebody may want to know.
    Note,
    /// Some pod does not run, or runs otherwise than the node's configuration says.
    Todo,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Todo => "todo",
        }
    }
}

/// One line of the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    /// What was looked at. The names are stable: programs read them.
    pub(super) check: &'static str,
    /// The handler of CRI that the finding is about.
    pub(super) handler: Option<String>,
    pub(super) state: State,
    /// What there is, and, unless that is well, what to do.
    pub(super) text: String,
}

impl Finding {
    pub(super) fn new(check: &'static str, (state, text): Verdict) -> Self {
        Self {
            check,
            handler: None,
            state,
            text,
        }
    }

    pub(super) fn of(check: &'static str, handler: &str, verdict: Verdict) -> Self {
        Self {
            handler: Some(handler.to_owned()),
            ..Self::new(check, verdict)
        }
    }

    fn subject(&self) -> String {
        match &self.handler {
            Some(handler) => format!("{} {handler}", self.check),
            None => self.check.to_owned(),
        }
    }
}

/// A state, and its words.
pub(super) type Verdict = (State, String);

pub(super) fn ok(text: impl Into<String>) -> Verdict {
    (State::Ok, text.into())
}

pub(super) fn note(text: impl Into<String>) -> Verdict {
    (State::Note, text.into())
}

pub(super) fn todo(text: impl Into<String>) -> Verdict {
    (State::Todo, text.into())
}

/// The answer: the exit code is 1 if there is something to do.
pub(super) fn said(findings: &[Finding], form: Form) -> Said {
    let to_do = findings.iter().any(|one| one.state == State::Todo);
    Said {
        text: match form {
            Form::Text => lines(findings),
            Form::Json => format!("{}\n", object(findings, to_do)),
        },
        code: u8::from(to_do),
    }
}

fn lines(findings: &[Finding]) -> String {
    let subjects = findings.iter().map(|one| one.subject().chars().count());
    let width = subjects.max().unwrap_or_default();
    let line = |one: &Finding| {
        // One line a finding, whatever a file or a program says.
        let text = one.text.split_whitespace().collect::<Vec<_>>().join(" ");
        format!(
            "{:<4}  {:<width$}  {text}\n",
            one.state.name(),
            one.subject()
        )
    };
    findings.iter().map(line).collect()
}

fn object(findings: &[Finding], to_do: bool) -> Value {
    let findings = findings.iter().map(|one| {
        json!({
            "check": one.check,
            "handler": one.handler,
            "state": one.state.name(),
            "text": one.text,
        })
    });
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "ok": !to_do,
        "findings": findings.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn one_thing_to_do_is_code_1_and_a_note_is_not() {
        let well = [
            Finding::new("containerd", ok("2.1.9")),
            Finding::of("handler", "pause", note("look\n  at this")),
        ];
        let text = said(&well, Form::Text);
        assert_eq!(text.code, 0);
        assert_eq!(
            text.text,
            "ok    containerd     2.1.9\nnote  handler pause  look at this\n"
        );
        let ill = [well[0].clone(), Finding::new("runtime", todo("install"))];
        let json = said(&ill, Form::Json);
        assert_eq!(json.code, 1);
        let value: Value = serde_json::from_str(&json.text).unwrap();
        assert_eq!(value["ok"], false);
        assert_eq!(value["findings"][1]["check"], "runtime");
        assert_eq!(value["findings"][1]["state"], "todo");
        assert_eq!(value["findings"][1]["handler"], Value::Null);
    }
}
