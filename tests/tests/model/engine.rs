//! Which states a model can be in after calls that were made at once.
//!
//! A model has a set of possible states: a process that ends by itself ends at a time that nobody knows. Calls made at
//! once may have taken effect in any order, so every order is tried. The answers that were seen throw out the states
//! and the orders that do not explain them. When nothing explains the answers, the shim did what it must not.

use std::collections::BTreeSet;
use std::fmt::Debug;

use containerd_shim_protos::api::Status;
use containerd_shim_protos::ttrpc::Code;

/// What was seen of a call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Answer {
    /// Success.
    Done,
    /// Success of State.
    Is(Status),
    /// A refusal.
    Refused(Code, String),
    /// No answer: a broken connection, or none within the bound.
    Silent(String),
    /// What has no answer: a kill from outside, a Wait that goes on.
    Unasked,
}

/// An answer that the model allows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Allowed {
    /// Success, or no answer where none is expected.
    Done,
    /// This status.
    Is(Status),
    /// A refusal with this code.
    Code(Code),
}

impl Allowed {
    fn matches(self, answer: &Answer) -> bool {
        match (self, answer) {
            (Self::Done, Answer::Done | Answer::Unasked) => true,
            (Self::Is(status), Answer::Is(seen)) => status == *seen,
            (Self::Code(code), Answer::Refused(seen, _)) => code == *seen,
            _ => false,
        }
    }
}

/// A model of what the calls `C` act on.
pub(crate) trait Model<C>: Clone + Ord + Debug {
    /// The answers to `calls[at]` that this state allows, each with the state after it. The other calls are made at the
    /// same time.
    fn outcomes(&self, calls: &[C], at: usize) -> Vec<(Allowed, Self)>;

    /// The states that this state may turn into by itself, in one step.
    fn by_itself(&self) -> Vec<Self>;
}

/// `states`, and all states that they may turn into by themselves.
pub(crate) fn closure<C, M: Model<C>>(states: impl IntoIterator<Item = M>) -> BTreeSet<M> {
    let mut found = BTreeSet::new();
    let mut open: Vec<M> = states.into_iter().collect();
    while let Some(state) = open.pop() {
        if found.insert(state.clone()) {
            open.extend(state.by_itself());
        }
    }
    found
}

/// The states after `calls`, which were made at once and got these answers.
pub(crate) fn after<C: Debug, M: Model<C>>(
    states: &BTreeSet<M>,
    calls: &[C],
    answers: &[Answer],
) -> Result<BTreeSet<M>, String> {
    let mut seen = BTreeSet::new();
    let mut results = BTreeSet::new();
    let mut open: Vec<(M, u32)> = states.iter().map(|state| (state.clone(), 0)).collect();
    while let Some((state, made)) = open.pop() {
        if !seen.insert((state.clone(), made)) {
            continue;
        }
        let left: Vec<usize> = (0..calls.len())
            .filter(|at| made & (1 << at) == 0)
            .collect();
        if left.is_empty() {
            results.insert(state.clone());
        }
        open.extend(state.by_itself().into_iter().map(|next| (next, made)));
        for at in left {
            for (allowed, next) in state.outcomes(calls, at) {
                if allowed.matches(&answers[at]) {
                    open.push((next, made | (1 << at)));
                }
            }
        }
    }
    if results.is_empty() {
        return Err(format!(
            "no order of {calls:?} explains {answers:?} in any of {states:#?}"
        ));
    }
    Ok(results)
}
