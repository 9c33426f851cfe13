//! An OCI runtime for a node whose cgroups have no controllers: empties `linux.resources` in the bundle's `config.json`
//! before `create` and `run`, says yes to `update`, and then is the runtime beside it, of the same name with `.real`.
//!
//! It stands before the runtime for every shim alike. It takes a part of a millisecond.
#![allow(
    clippy::print_stderr,
    reason = "a shim reads the errors of its runtime there"
)]

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::{env, fs};

fn main() -> ExitCode {
    let words: Vec<String> = env::args().collect();
    if words.iter().any(|word| word == "update") {
        return ExitCode::SUCCESS;
    }
    if words.iter().any(|word| word == "create" || word == "run") {
        let bundle = words.iter().enumerate().find_map(|(at, word)| {
            word.strip_prefix("--bundle=")
                .or_else(|| (word == "--bundle").then(|| words.get(at + 1).map(String::as_str))?)
        });
        let config = Path::new(bundle.unwrap_or(".")).join("config.json");
        if let Some(changed) = fs::read_to_string(&config)
            .ok()
            .and_then(|text| without_limits(&text))
        {
            let _ = fs::write(&config, changed);
        }
    }
    let Ok(program) = env::current_exe() else {
        return ExitCode::FAILURE;
    };
    let error = Command::new(program.with_extension("real"))
        .arg0(&words[0])
        .args(&words[1..])
        .exec();
    eprintln!("no-limits: {}.real: {error}", program.display());
    ExitCode::FAILURE
}

/// The text with an empty object behind `"resources":`. A JSON parser would take several times as long.
fn without_limits(text: &str) -> Option<String> {
    let begin = text.find("\"resources\":{")? + "\"resources\":".len();
    let (mut depth, mut quoted, mut escaped) = (0, false, false);
    for (at, byte) in text.bytes().enumerate().skip(begin) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            b'{' if !quoted => depth += 1,
            b'}' if !quoted => {
                depth -= 1;
                if depth == 0 {
                    return Some(format!("{}{{}}{}", &text[..begin], &text[at + 1..]));
                }
            }
            _ => {}
        }
    }
    None
}
