//! Edits of containerd's configuration files. Every other byte of a file stays: comments, order, line ends.
//!
//! ```text
//!  imports = ["/a.toml"]      ──add_import──▶  imports = ["/a.toml", "OURS"]
//!  (no imports)               ──add_import──▶  imports = ["OURS"] # added by …      below the version, or first
//!  … the end of the file      ──add_block───▶  … # >>> …  [a table]  # <<< …
//! ```
//! What was added is taken out again, and the file is as before. Lines that a person has written since stay.

use std::ops::Range;

use serde::Deserialize;
use toml::{Spanned, Table};

use crate::error::{Error, Result};

/// Ends a line that is ours as a whole.
const LINE: &str = " # added by containerd-shim-pause-v2 install";
const BEGIN: &str = "# >>> containerd-shim-pause-v2 install";
/// Behind [`BEGIN`] where the text before the block ended without a line end.
const NO_LINE_END: &str = " (the line above had no end)";
const TAKE_OUT: &str = ": `containerd-shim-pause-v2 uninstall` takes these lines out";
const END: &str = "# <<< containerd-shim-pause-v2 install";

/// What stands above the first table, with its places.
#[derive(Deserialize)]
struct Head {
    version: Option<Spanned<i64>>,
    imports: Option<Spanned<Vec<Spanned<String>>>>,
}

impl Head {
    fn of(text: &str) -> Result<Self> {
        toml::from_str(text).map_err(|error| refused(&error))
    }
}

fn refused(error: &toml::de::Error) -> Error {
    Error::FailedPrecondition(format!("no TOML of containerd's: {}", error.message()))
}

/// The text as a table.
///
/// # Errors
/// `FailedPrecondition` for text that is no TOML.
pub(super) fn parse(text: &str) -> Result<Table> {
    toml::from_str(text).map_err(|error| refused(&error))
}

/// The version of the format of a file; 1 without a line that says so.
///
/// # Errors
/// As [`parse`].
pub(crate) fn version(text: &str) -> Result<i64> {
    Ok(Head::of(text)?
        .version
        .map_or(1, |version| *version.as_ref()))
}

/// The entries of `imports`.
///
/// # Errors
/// As [`parse`].
pub(crate) fn imports(text: &str) -> Result<Vec<String>> {
    let imports = Head::of(text)?.imports.map(Spanned::into_inner);
    let imports = imports.unwrap_or_default();
    Ok(imports.into_iter().map(Spanned::into_inner).collect())
}

/// Adds an entry to `imports`.
///
/// # Errors
/// As [`parse`].
pub(crate) fn add_import(text: &str, entry: &str) -> Result<String> {
    let head = Head::of(text)?;
    let Some(imports) = head.imports else {
        let line = format!("{}{}", own_line(entry), line_end(text));
        let below = head.version.and_then(|version| {
            let end = version.span().end;
            text[end..].find('\n').map(|length| end + length + 1)
        });
        return Ok(inserted(text, below.unwrap_or(0), &line));
    };
    let span = imports.span();
    let entries = imports.into_inner();
    if entries.iter().any(|known| known.as_ref() == entry) {
        return Ok(text.to_owned());
    }
    Ok(match entries.last() {
        Some(last) => inserted(text, last.span().end, &format!(", {}", quoted(entry))),
        None => inserted(text, span.start + 1, &quoted(entry)),
    })
}

/// Takes an entry out of `imports`.
///
/// # Errors
/// As [`parse`].
pub(crate) fn remove_import(text: &str, entry: &str) -> Result<String> {
    let own = own_line(entry);
    let mut start = 0;
    for line in text.split_inclusive('\n') {
        if line.trim_end_matches(['\r', '\n']) == own {
            return Ok(without(text, start..start + line.len()));
        }
        start += line.len();
    }
    let Some(imports) = Head::of(text)?.imports else {
        return Ok(text.to_owned());
    };
    let entries = imports.into_inner();
    let Some(place) = entries.iter().position(|known| known.as_ref() == entry) else {
        return Ok(text.to_owned());
    };
    let span = |at: usize| entries.get(at).map(Spanned::span);
    let own = entries[place].span();
    let before = place.checked_sub(1).and_then(span);
    Ok(match (before, span(place + 1)) {
        (Some(before), _) => without(text, before.end..own.end),
        (None, Some(after)) => without(text, own.start..after.start),
        (None, None) => without(text, own),
    })
}

/// Appends lines, between two that say whose the lines are. `lines` ends with a line end.
pub(crate) fn add_block(text: &str, lines: &str) -> String {
    let (join, remark) = if text.is_empty() || text.ends_with('\n') {
        ("", "")
    } else {
        ("\n", NO_LINE_END)
    };
    let block = format!("{join}{BEGIN}{remark}{TAKE_OUT}\n{lines}{END}\n");
    let block = match line_end(text) {
        "\n" => block,
        end => block.replace('\n', end),
    };
    format!("{text}{block}")
}

/// Takes out what [`add_block`] has appended; none in a text without a block, or with half of one.
pub(crate) fn without_block(text: &str) -> Option<String> {
    let begin = line_that_begins(text, BEGIN, 0)?;
    let end = line_that_begins(text, END, begin.end)?;
    let remark = text[begin.start + BEGIN.len()..].starts_with(NO_LINE_END);
    let start = match &text[..begin.start] {
        // What follows the block now needs the line end.
        _ if end.end < text.len() => begin.start,
        before if remark => before.trim_end_matches('\n').trim_end_matches('\r').len(),
        before => before.len(),
    };
    Some(without(text, start..end.end))
}

/// The first line from `from` on that begins so, with its line end.
fn line_that_begins(text: &str, words: &str, from: usize) -> Option<Range<usize>> {
    let mut start = from;
    for line in text.get(from..)?.split_inclusive('\n') {
        if line.starts_with(words) {
            return Some(start..start + line.len());
        }
        start += line.len();
    }
    None
}

fn own_line(entry: &str) -> String {
    format!("imports = [{}]{LINE}", quoted(entry))
}

/// A string of TOML. JSON's escapes are among those of TOML.
pub(super) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// How the first line of a text ends.
fn line_end(text: &str) -> &'static str {
    match text.split_once('\n') {
        Some((line, _)) if line.ends_with('\r') => "\r\n",
        _ => "\n",
    }
}

fn inserted(text: &str, at: usize, more: &str) -> String {
    format!("{}{more}{}", &text[..at], &text[at..])
}

fn without(text: &str, range: Range<usize>) -> String {
    format!("{}{}", &text[..range.start], &text[range.end..])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const OURS: &str = "/etc/containerd/conf.d/ours*.toml";

    /// As people have them.
    const FILES: &[&str] = &[
        "",
        "version = 2\n",
        "version = 3",
        "# kind's\nversion = 2 # the format\n\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"x\"\n",
        "imports = []\nversion = 3\n",
        "version = 3\nimports = [ ]\n[a]\nb = 1\n",
        "imports = [\"/etc/containerd/runtime_*.toml\"]\n[plugins]\n",
        "imports = [\n  \"/a.toml\", # one\n  '/b.toml', # two\n]\nversion = 2\n[debug]\n  level = \"info\"\n",
        "disabled_plugins = []\r\nversion = 2\r\n[grpc]\r\n  address = '/x' # own\r\n",
        "# no version\n[plugins.cri]\n  x = 1",
        "\"imports\" = [\"/a\"]\nversion = 4\nroot = '/x'\n",
        "version = 2\n[plugins]\nimports = ['no top key']\n",
    ];

    #[test]
    fn an_import_is_added_once_and_taken_out_again() {
        for file in FILES {
            let added = add_import(file, OURS).unwrap();
            let mut expected = imports(file).unwrap();
            expected.push(OURS.to_owned());
            assert_eq!(imports(&added).unwrap(), expected, "{added}");
            let (mut before, mut after) = (parse(file).unwrap(), parse(&added).unwrap());
            before.remove("imports");
            after.remove("imports");
            assert_eq!(before, after, "{added}");
            assert_eq!(add_import(&added, OURS).unwrap(), added);
            assert_eq!(&remove_import(&added, OURS).unwrap(), file);
            assert_eq!(&remove_import(file, OURS).unwrap(), file);
            assert_eq!(
                added.contains("\r\n"),
                added.matches('\n').count() > 0 && file.contains("\r\n")
            );
        }
    }

    #[test]
    fn comments_and_line_ends_stay() {
        let added = add_import(FILES[7], OURS).unwrap();
        assert_eq!(
            added,
            FILES[7].replace("'/b.toml',", &format!("'/b.toml', \"{OURS}\","))
        );
        let added = add_import(FILES[8], OURS).unwrap();
        assert!(!added.replace("\r\n", "").contains('\n'), "{added:?}");
        assert!(add_import(FILES[3], OURS).unwrap().starts_with(&format!(
            "# kind's\nversion = 2 # the format\nimports = [\"{OURS}\"]"
        )));
    }

    #[test]
    fn what_a_person_added_to_an_import_since_stays() {
        let added = add_import("version = 3\n", OURS).unwrap();
        let more = added.replace("] #", ", \"/mine.toml\"] #");
        let removed = remove_import(&more, OURS).unwrap();
        assert_eq!(imports(&removed).unwrap(), ["/mine.toml"]);
    }

    #[test]
    fn a_block_is_added_and_taken_out_again() {
        let lines = "[plugins.x.y]\n  z = 1\n";
        for file in FILES {
            let added = add_block(file, lines);
            assert_eq!(
                parse(&added).unwrap()["plugins"]["x"]["y"]["z"].as_integer(),
                Some(1),
                "{added}"
            );
            assert_eq!(without_block(&added).as_deref(), Some(*file), "{added}");
            assert_eq!(without_block(file), None);
            // A person's later lines stay, and stay lines of their own.
            let later = format!("{added}[later]\n");
            let kept = without_block(&later).unwrap();
            assert!(
                kept.starts_with(file) && kept.ends_with("[later]\n"),
                "{kept}"
            );
            assert!(parse(&kept).unwrap().contains_key("later"));
        }
        assert_eq!(
            without_block(&format!("a = 1\n{BEGIN}\n[b]\n")),
            None,
            "half a block"
        );
    }

    #[test]
    fn versions_are_read() {
        let read: Vec<_> = FILES.iter().map(|file| version(file).unwrap()).collect();
        assert_eq!(read, [1, 2, 3, 2, 3, 3, 1, 2, 2, 1, 4, 2]);
        for wrong in [
            "version = ",
            "version = \"2\"",
            "imports = 'x'",
            "a = 1\na = 2",
        ] {
            assert!(matches!(version(wrong), Err(Error::FailedPrecondition(_))));
        }
    }

    #[test]
    fn strings_are_quoted_for_toml() {
        for text in ["", "/a b", "\"\\\n\t\u{1}é"] {
            let table = parse(&format!("x = {}", quoted(text))).unwrap();
            assert_eq!(table["x"].as_str(), Some(text));
        }
    }
}
