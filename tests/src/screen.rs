//! Plain text of 100 columns; colour only on a terminal. Errors of writing are ignored: a program whose output is
//! closed must still take everything down.

use std::io::{IsTerminal, Write};

const WIDTH: usize = 100;
const BOLD: &str = "1";
const GREEN: &str = "32";
const RED: &str = "1;31";

fn paint(terminal: bool, code: &str, text: &str) -> String {
    if terminal && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

fn out(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn on_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// A heading.
pub fn title(text: &str) {
    out("");
    out(&paint(on_terminal(), BOLD, text));
}

/// A line, never wrapped.
pub fn line(text: &str) {
    out(format!("   {text}").trim_end());
}

/// Text of any length, wrapped.
pub fn text(text: &str) {
    for part in wrapped(text, WIDTH - 3) {
        line(&part);
    }
}

/// `name`, and text of any length beside the name.
pub fn item(name: &str, text: &str) {
    for (number, part) in wrapped(text, WIDTH - 15).iter().enumerate() {
        let name = if number == 0 { name } else { "" };
        line(&format!("{name:<12}{part}"));
    }
}

/// A check that has passed.
pub fn ok(text: &str) {
    for (number, part) in wrapped(text, WIDTH - 7).iter().enumerate() {
        let mark = if number == 0 {
            paint(on_terminal(), GREEN, "ok")
        } else {
            "  ".to_owned()
        };
        line(&format!("{mark}  {part}"));
    }
}

/// A failure, on standard error.
pub fn alarm(text: &str) {
    let terminal = std::io::stderr().is_terminal();
    let _ = writeln!(std::io::stderr(), "\n{}", paint(terminal, RED, text));
}

/// `name`, and text of any length beside the name, on standard error.
pub fn note(name: &str, text: &str) {
    for paragraph in text.lines() {
        for (number, part) in wrapped(paragraph, WIDTH - 15).iter().enumerate() {
            let name = if number == 0 { name } else { "" };
            let _ = writeln!(std::io::stderr(), "   {name:<12}{part}");
        }
    }
}

/// Columns, each as wide as its widest cell; the first row is the heading.
pub fn table(rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            let lengths = rows
                .iter()
                .filter_map(|row| Some(row.get(column)?.chars().count()));
            lengths.max().unwrap_or_default()
        })
        .collect();
    for (number, row) in rows.iter().enumerate() {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, &width)| format!("{cell:<width$}"));
        let text = cells.collect::<Vec<_>>().join("  ");
        if number == 0 {
            line(&paint(on_terminal(), BOLD, text.trim_end()));
            line(&"-".repeat(widths.iter().sum::<usize>() + 2 * (columns - 1)));
        } else {
            line(&text);
        }
    }
}

/// At most `width` characters; a `…` stands for the missing ones.
pub fn short(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().take(width - 1).collect();
    format!("{kept}…")
}

fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let last = lines.len() - 1;
        let line = &mut lines[last];
        if line.is_empty() {
            word.clone_into(line);
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            *line += &format!(" {word}");
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}
