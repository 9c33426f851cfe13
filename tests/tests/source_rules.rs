//! Rules about the source text that no compiler checks: which module may use which, where `unsafe` may stand, how long
//! a file may get. A rule that stands in the way is changed here, with its reason, and not worked around.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// The rooms of `shim/src`, top first. A room may use the rooms below it, and no other.
const ROOMS: [&str; 9] = [
    "cli",
    "node",
    "containerd",
    "pod",
    "container",
    "runtime",
    "io",
    "kernel",
    "error",
];

/// In `shim/` and `pause/`, tests aside.
const LONGEST_FILE: usize = 400;
const LONGEST_FUNCTION: usize = 60;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or_else(|| Path::new("."))
}

/// All files below `folder`, without `target` and hidden folders other than `.ci`, `.cargo` and `.config`.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let hidden =
            name.starts_with('.') && ![".ci", ".cargo", ".config"].contains(&name.as_ref());
        match entry.file_type()? {
            kind if kind.is_dir() && name != "target" && !hidden => {
                found.append(&mut files(&entry.path())?);
            }
            kind if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
    Ok(found)
}

fn rust_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = files(folder)?;
    found.retain(|file| file.extension().is_some_and(|extension| extension == "rs"));
    Ok(found)
}

/// Whether a file holds tests alone: below `tests/`, or the `tests.rs` of a module.
fn is_test(file: &Path) -> bool {
    shown(file).split('/').any(|part| part == "tests") || file.ends_with("tests.rs")
}

/// Path as seen from the project's root, for messages and comparisons.
fn shown(file: &Path) -> String {
    file.strip_prefix(root())
        .unwrap_or(file)
        .display()
        .to_string()
}

/// The text without line comments, and without the unit tests at its end: those may use anything.
fn product_code(text: &str) -> String {
    let end = text.find("#[cfg(test)]\nmod ").unwrap_or(text.len());
    let lines = text[..end]
        .lines()
        .map(|line| line.split_once("//").map_or(line, |(code, _)| code));
    lines.collect::<Vec<_>>().join("\n")
}

fn ident(text: &str) -> &str {
    let end = text
        .find(|c: char| !(c.is_alphanumeric() || c == '_'))
        .unwrap_or(text.len());
    &text[..end]
}

/// The modules of the crate that a file names: `crate::x`, `crate::{x, y::z}`, and `super::x`, which is the same where
/// `super` is the crate's root.
fn named_modules(code: &str, parent_is_root: bool) -> Vec<String> {
    let mut found = Vec::new();
    let prefixes: &[&str] = if parent_is_root {
        &["crate::", "super::"]
    } else {
        &["crate::"]
    };
    for prefix in prefixes {
        for (at, _) in code.match_indices(prefix) {
            let inside_a_word =
                code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':');
            let rest = &code[at + prefix.len()..];
            if inside_a_word {
                continue;
            }
            match rest.strip_prefix('{') {
                Some(group) => found.extend(first_names(group)),
                None => found.push(ident(rest).to_owned()),
            }
        }
    }
    found.retain(|name| !name.is_empty());
    found
}

/// The first name of each path in `a, b::c, d::{e, f}}…`, up to the brace that closes the group.
fn first_names(group: &str) -> Vec<String> {
    let mut names = Vec::new();
    let (mut depth, mut start) = (0_usize, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            ',' | '}' if depth == 0 => {
                names.push(ident(group[start..at].trim()).to_owned());
                start = at + 1;
                if c == '}' {
                    break;
                }
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    names
}

/// The place of a room; `None` for a name that is no room.
fn place(room: &str) -> Option<usize> {
    ROOMS.iter().position(|known| *known == room)
}

/// Whether `user` may name `used`.
fn may_use(user: &str, used: &str) -> bool {
    match (place(user), place(used)) {
        (Some(above), Some(below)) => above <= below,
        // A macro or a type at the crate's root.
        (Some(_) | None, _) => true,
    }
}

#[test]
fn no_room_of_the_shim_uses_one_above_it() -> Result {
    let src = root().join("shim/src");
    let mut wrong = Vec::new();
    for file in rust_files(&src)?.into_iter().filter(|file| !is_test(file)) {
        let inside = file.strip_prefix(&src)?;
        // io/fifo.rs and io/mod.rs belong to io; lib.rs and main.rs hold the rooms together, and fuzzing, which is
        // not in the binary, calls the parsers of all rooms.
        let room = inside
            .iter()
            .next()
            .map(|name| name.to_string_lossy().trim_end_matches(".rs").to_owned())
            .unwrap_or_default();
        if ["lib", "main", "fuzzing"].contains(&room.as_str()) {
            continue;
        }
        if place(&room).is_none() {
            wrong.push(format!(
                "{}: give `{room}` a place in ROOMS of {}",
                shown(&file),
                file!()
            ));
            continue;
        }
        let parent_is_root = inside.ends_with("mod.rs") && inside.iter().count() == 2;
        let mut used = named_modules(&product_code(&fs::read_to_string(&file)?), parent_is_root);
        used.sort_unstable();
        used.dedup();
        used.retain(|used| !may_use(&room, used));
        wrong.extend(
            used.iter()
                .map(|used| format!("{}: `{room}` uses `{used}`", shown(&file))),
        );
    }
    assert!(
        wrong.is_empty(),
        "imports go down only (see ROOMS in {}):\n{}",
        file!(),
        wrong.join("\n")
    );
    Ok(())
}

#[test]
fn the_pause_crate_knows_neither_tokio_nor_ttrpc_nor_containerd() -> Result {
    let manifest = fs::read_to_string(root().join("pause/Cargo.toml"))?;
    let wrong: Vec<_> = manifest
        .lines()
        .map(|line| ident(line.trim()))
        .filter(|name| ["tokio", "ttrpc", "containerd", "shim"].contains(name))
        .collect();
    assert!(wrong.is_empty(), "pause/Cargo.toml names {wrong:?}");
    Ok(())
}

#[test]
fn the_shim_forbids_unsafe_code() -> Result {
    for file in ["shim/src/main.rs", "shim/src/lib.rs"] {
        let text = fs::read_to_string(root().join(file))?;
        assert!(text.contains("#![forbid(unsafe_code)]"), "{file}");
    }
    Ok(())
}

#[test]
fn the_binary_is_thin() -> Result {
    let lines = fs::read_to_string(root().join("shim/src/main.rs"))?
        .lines()
        .count();
    assert!(lines < 60, "shim/src/main.rs has {lines} lines");
    Ok(())
}

#[test]
fn unsafe_stands_only_in_the_pause_program_and_in_one_module_of_the_pause_crate() -> Result {
    let mut wrong = Vec::new();
    for file in rust_files(root())? {
        let name = shown(&file);
        if name == "pause/src/sys.rs"
            || name.starts_with("pause/init/")
            // Runs inside containers, as the user's program would.
            || name.starts_with("tests/probe/")
            || name == "tests/tests/source_rules.rs"
        {
            continue;
        }
        let text = fs::read_to_string(&file)?;
        for (number, line) in text.lines().enumerate() {
            if has_unsafe(line) {
                wrong.push(format!("{name}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "unsafe belongs into pause/src/sys.rs:\n{}",
        wrong.join("\n")
    );
    Ok(())
}

/// Whether a line has the keyword: not in a comment, not as part of `unsafe_code`, not in a string.
fn has_unsafe(line: &str) -> bool {
    let code = line.split_once("//").map_or(line, |(code, _)| code);
    code.match_indices("unsafe").any(|(at, word)| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        let part = |c: Option<char>| {
            c.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '"' || c == '`')
        };
        !part(before) && !part(after) && code[..at].matches('"').count().is_multiple_of(2)
    })
}

/// The files of the product: `shim/` and `pause/`, without those that hold tests alone.
fn product_files() -> Result<Vec<PathBuf>> {
    let mut found = rust_files(&root().join("shim"))?;
    found.append(&mut rust_files(&root().join("pause"))?);
    found.retain(|file| !is_test(file));
    Ok(found)
}

#[test]
fn files_stay_short() -> Result {
    let mut wrong = Vec::new();
    for file in product_files()? {
        let lines = fs::read_to_string(&file)?.lines().count();
        if lines > LONGEST_FILE {
            wrong.push(format!("{}: {lines} lines", shown(&file)));
        }
    }
    assert!(
        wrong.is_empty(),
        "more than {LONGEST_FILE} lines, find the two subjects in it:\n{}",
        wrong.join("\n")
    );
    Ok(())
}

#[test]
fn functions_stay_short() -> Result {
    let mut wrong = Vec::new();
    for file in product_files()? {
        let text = fs::read_to_string(&file)?;
        let product = text.find("#[cfg(test)]\nmod ").unwrap_or(text.len());
        for (name, lines) in functions(&text[..product]) {
            if lines > LONGEST_FUNCTION {
                wrong.push(format!("{}: `{name}` has {lines} lines", shown(&file)));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "more than {LONGEST_FUNCTION} lines, name the steps:\n{}",
        wrong.join("\n")
    );
    Ok(())
}

/// The functions of a text that rustfmt has formatted, with their numbers of lines, from `fn` to the closing brace.
fn functions(text: &str) -> Vec<(&str, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (begin, line) in lines.iter().enumerate() {
        let Some(name) = function_name(line) else {
            continue;
        };
        let indent = &line[..line.len() - line.trim_start().len()];
        let rest = lines[begin..].iter();
        // A line with the function's own indentation that begins with the brace, or ends a declaration.
        let end = rest.enumerate().find(|(at, line)| {
            let own = line.strip_prefix(indent);
            own.is_some_and(|own| own.starts_with('}')) || (*at == 0 && line.ends_with([';', '}']))
        });
        if let Some((length, _)) = end {
            found.push((name, length + 1));
        }
    }
    found
}

/// The name of the function that begins on a line.
fn function_name(line: &str) -> Option<&str> {
    let (before, after) = line.split_once("fn ")?;
    let words = before.split_whitespace();
    let modifier = |word: &str| {
        word.starts_with("pub")
            || ["const", "async", "unsafe", "extern", "\"C\""].contains(&word)
            || word.starts_with("in")
            || word.ends_with(')')
    };
    let begins = words.into_iter().all(modifier)
        && !after.starts_with(|c: char| !c.is_alphabetic() && c != '_');
    begins.then(|| ident(after))
}

/// The page with the table "I want to change …".
const CHANGING: &str = "docs/changing.md";

#[test]
fn the_readme_names_files_that_exist_and_every_module_of_the_shim() -> Result {
    let readme = fs::read_to_string(root().join("README.md"))?;
    assert!(
        links(&readme).contains(&CHANGING),
        "README.md does not lead to {CHANGING}"
    );
    let page = fs::read_to_string(root().join(CHANGING))?;
    let table = page.split_once("| I want to change");
    let (_, table) = table.ok_or("docs/changing.md has no table \"I want to change …\"")?;
    let named: Vec<_> = table
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|name| name.contains('/') && !name.contains([' ', '<', ':']))
        .collect();
    let gone: Vec<_> = named
        .iter()
        .filter(|name| !root().join(name).exists())
        .collect();
    assert!(
        gone.is_empty(),
        "{CHANGING} names {gone:?}, which are not there"
    );

    let mut modules: Vec<_> = rust_files(&root().join("shim/src"))?
        .into_iter()
        .filter(|file| !is_test(file) && !file.ends_with("mod.rs"))
        .map(|file| shown(&file))
        .collect();
    // By its own name, or by that of a folder in a room, such as `shim/src/kernel/cgroup/`.
    modules.retain(|module| {
        !named
            .iter()
            .any(|name| name == module || (name.ends_with('/') && module.starts_with(name)))
    });
    assert!(
        modules.is_empty(),
        "{CHANGING} does not say what {modules:?} are for"
    );
    Ok(())
}

#[test]
fn links_between_the_pages_lead_somewhere() -> Result {
    let mut wrong = Vec::new();
    let mut pages = files(root())?;
    pages.retain(|file| file.extension().is_some_and(|extension| extension == "md"));
    for page in pages {
        let text = fs::read_to_string(&page)?;
        for link in links(&text) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match path {
                "" => page.clone(),
                path => page.parent().unwrap_or(root()).join(path),
            };
            if !target.exists() {
                wrong.push(format!("{}: {link} is not there", shown(&page)));
            } else if !anchor.is_empty()
                && !anchors(&fs::read_to_string(&target)?).contains(&anchor.to_owned())
            {
                wrong.push(format!("{}: {link} has no such heading", shown(&page)));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// The lines of a page that are not in a fenced block.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut fenced = false;
    text.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    })
}

/// Where the links of a page lead: `](here)`.
fn links(text: &str) -> Vec<&str> {
    prose(text)
        .flat_map(|line| line.split("](").skip(1))
        .filter_map(|rest| rest.split_once(')'))
        .map(|(link, _)| link)
        .collect()
}

/// The anchors that GitHub gives to the headings of a page.
fn anchors(text: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for line in prose(text).filter(|line| line.starts_with('#')) {
        let anchor: String = line
            .trim_start_matches('#')
            .trim()
            .to_lowercase()
            .replace(' ', "-")
            .chars()
            .filter(|c| c.is_alphanumeric() || ['-', '_'].contains(c))
            .collect();
        // The second of a name gets a number.
        let again = |number: usize| match number {
            0 => anchor.clone(),
            number => format!("{anchor}-{number}"),
        };
        let free = (0..).map(again).find(|name| !found.contains(name));
        found.extend(free);
    }
    found
}

#[test]
fn only_ci_and_the_lab_look_beside_the_project() -> Result {
    // Put together, so that this file does not find itself.
    let beside = ["..", "shared"].join("/");
    let mut wrong = Vec::new();
    for file in files(root())? {
        let name = shown(&file);
        if name == ".ci/run" || name.starts_with("tests/lab/") {
            continue;
        }
        // What is not text cannot be read as a string, and names no folder.
        if fs::read_to_string(&file).is_ok_and(|text| text.contains(&beside)) {
            wrong.push(name);
        }
    }
    assert!(
        wrong.is_empty(),
        "a clone of the project has nothing beside it, but these look there: {wrong:?}"
    );
    Ok(())
}

// --- the rules' own tools ------------------------------------------------------------------------------------------

#[test]
fn imports_are_found_in_every_way_of_writing_them() {
    let code = "use crate::error::{Error, Result};\nuse crate::{pod::Pod, runc, io::{fifo, pty}};\nlet x = crate::exits::take();";
    assert_eq!(
        named_modules(code, true),
        ["error", "pod", "runc", "io", "exits"]
    );
    assert_eq!(named_modules("use super::pod::Pod;", true), ["pod"]);
    assert_eq!(named_modules("use super::pod::Pod;", false), [""; 0]);
    assert_eq!(named_modules("use other_crate::pod;", true), [""; 0]);
    assert_eq!(
        named_modules(&product_code("// use crate::pod;\nuse crate::io;"), true),
        ["io"]
    );
    assert_eq!(
        named_modules(
            &product_code("use crate::io;\n#[cfg(test)]\nmod tests {\nuse crate::pod;"),
            true
        ),
        ["io"]
    );
}

#[test]
fn a_climb_is_seen_and_a_step_down_is_not() {
    for (user, used) in [
        ("cli", "containerd"),
        ("pod", "error"),
        ("io", "io"),
        ("runtime", "kernel"),
    ] {
        assert!(may_use(user, used), "{user} → {used}");
    }
    for (user, used) in [
        ("containerd", "cli"),
        ("kernel", "runtime"),
        ("error", "runtime"),
        ("io", "pod"),
    ] {
        assert!(!may_use(user, used), "{user} → {used}");
    }
}

#[test]
fn the_keyword_is_told_from_words_that_hold_it() {
    assert!(has_unsafe("    let x = unsafe { f() };"));
    assert!(has_unsafe("unsafe impl Send for X {}"));
    assert!(!has_unsafe("#![forbid(unsafe_code)]"));
    assert!(!has_unsafe("// unsafe { }"));
    assert!(!has_unsafe("let x = \"an unsafe value\";"));
}

#[test]
fn links_and_anchors_are_read_as_a_browser_does() {
    let page = "# The shim's options\nSee [a](b.md#c), [d](#e).\n```\n# no [f](g)\n```\n## `x://`, or y\n## `x://`, or y\n";
    assert_eq!(links(page), ["b.md#c", "#e"]);
    assert_eq!(anchors(page), ["the-shims-options", "x-or-y", "x-or-y-1"]);
}

#[test]
fn the_lines_of_functions_are_counted() {
    let text = "fn a() {\n    x();\n}\nimpl B {\n    pub(super) async fn c(\n        d: E,\n    ) -> F {\n        if g {\n            h\n        }\n    }\n}\n// A fn that is none.\nlet i = fn_name();\n";
    assert_eq!(functions(text), [("a", 3), ("c", 7)]);
}
