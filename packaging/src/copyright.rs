//! The file `copyright`: the licenses of all that is linked into the shim.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::Result;
use crate::linked::{Crate, Id};

const OWN: &str = "\
containerd-shim-pause-v2: a containerd shim with the pause container built in

Copyright 2026 the authors of containerd-shim-pause-v2

Licensed under the Apache License, Version 2.0. On Debian systems, the text of this license is in
/usr/share/common-licenses/Apache-2.0.

The binary is linked statically. So it contains parts of what is listed here, each under its own license.

The GNU C Library, Copyright the Free Software Foundation and others: LGPL-2.1-or-later, on Debian systems in
/usr/share/common-licenses/LGPL-2.1. To link the shim with another one, build it from its source: make build.

The Rust standard library, Copyright the Rust Project contributors: MIT OR Apache-2.0.

";

/// How the names of the files begin in which crates carry their licenses.
const NAMES: [&str; 7] = [
    "LICENSE",
    "LICENCE",
    "COPYING",
    "UNLICENSE",
    "NOTICE",
    "THIRD-PARTY",
    "COPYRIGHT",
];

/// The whole file.
///
/// # Errors
/// When a crate has neither a text of its license nor the Apache License, whose text is with the shim.
pub(crate) fn text(linked: &BTreeMap<Id, Crate>) -> Result<String> {
    let mut list = String::new();
    // Each text once, with those who carry it.
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (id, one) in linked.iter().filter(|(_, one)| one.source.is_some()) {
        let name = format!("{} {}", id.0, id.1);
        writeln!(list, "{name}: {}", one.license)?;
        let found = texts_in(&one.folder)?;
        if found.is_empty() && !one.license.contains("Apache-2.0") {
            return Err(format!("{name} has no text of its license ({})", one.license).into());
        }
        for text in found {
            texts.entry(text).or_default().push(name.clone());
        }
    }
    let mut texts: Vec<(String, Vec<String>)> = texts.into_iter().collect();
    texts.sort_by(|one, next| one.1.cmp(&next.1));
    let mut whole = format!("{OWN}{list}");
    for (text, carriers) in texts {
        let rule = "-".repeat(79);
        write!(whole, "\n{rule}\n{}:\n\n{text}\n", carriers.join(", "))?;
    }
    Ok(whole)
}

/// The texts of licenses in a crate's folder, but for the Apache License: that one is the shim's own.
fn texts_in(folder: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().to_uppercase();
        if !entry.file_type()?.is_file() || !NAMES.iter().any(|begin| name.starts_with(begin)) {
            continue;
        }
        let text = fs::read_to_string(entry.path())?;
        if !is_apache(&text) {
            found.push(tidy(&without_terms(&text)));
        }
    }
    found.sort();
    Ok(found)
}

/// Whether a text begins with the title of the Apache License, however far that is indented, and has its terms.
fn is_apache(text: &str) -> bool {
    let title: Vec<&str> = text.split_whitespace().take(4).collect();
    title == ["Apache", "License", "Version", "2.0,"] && text.contains("TERMS AND CONDITIONS")
}

/// A list of several licenses, without the terms of the Apache License among them.
fn without_terms(text: &str) -> String {
    const END: &str = "END OF TERMS AND CONDITIONS";
    let begin = text.find("TERMS AND CONDITIONS FOR USE");
    match begin.zip(text.find(END)) {
        Some((begin, end)) if begin < end => format!(
            "{}(the terms: /usr/share/common-licenses/Apache-2.0){}",
            &text[..begin],
            &text[end + END.len()..]
        ),
        Some(_) | None => text.to_owned(),
    }
}

/// Without carriage returns, spaces at the ends of lines, and empty lines at both ends.
fn tidy(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    lines.join("\n").trim_matches('\n').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_apache_license_is_told_from_texts_that_name_it() {
        let apache = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../LICENSE"));
        assert!(apache.is_ok_and(|text| is_apache(&text)));
        assert!(!is_apache(
            "Licensed under the Apache License or the MIT license"
        ));
    }

    #[test]
    fn the_terms_of_the_apache_license_are_said_by_a_path() {
        let list = "one\nTERMS AND CONDITIONS FOR USE\nmuch\nEND OF TERMS AND CONDITIONS\ntwo";
        let path = "one\n(the terms: /usr/share/common-licenses/Apache-2.0)\ntwo";
        assert_eq!(without_terms(list), path);
        assert_eq!(without_terms(path), path);
    }

    #[test]
    fn one_text_with_other_line_ends_is_one_text() {
        assert_eq!(tidy("\na  \r\nb\r\n\r\n"), tidy("a\nb"));
    }
}
