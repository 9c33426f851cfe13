//! What an attacker with CAP_SYS_PTRACE reaches in another process: one line per success.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};

/// Tries everything on `pid`. Gives the successes, one line each; `nothing` when there is none.
pub(crate) fn attack(pid: i32) -> String {
    let got = [
        read_environment(pid),
        read_memory(pid),
        read_maps(pid),
        write_program(pid),
        find_program(pid),
        list_root(pid),
        list_descriptors(pid),
        trace(pid),
    ]
    .concat();
    if got.is_empty() {
        "nothing".to_owned()
    } else {
        got.join("\n")
    }
}

fn path(pid: i32, name: &str) -> String {
    format!("/proc/{pid}/{name}")
}

/// Reading the environment file may succeed; what counts is whether there is anything in the file.
fn read_environment(pid: i32) -> Vec<String> {
    match fs::read(path(pid, "environ")) {
        Ok(environment) if !environment.iter().all(|&byte| byte == 0) => vec![format!(
            "environ: {}",
            String::from_utf8_lossy(&environment).replace('\0', " ")
        )],
        _ => Vec::new(),
    }
}

fn read_memory(pid: i32) -> Vec<String> {
    let Ok(mut memory) = File::open(path(pid, "mem")) else {
        return Vec::new();
    };
    let mut got = read_mappings(&mut memory, pid);
    // Without maps: the usual place of a static program.
    let mut bytes = [0; 16];
    if memory.seek(SeekFrom::Start(0x40_0000)).is_ok()
        && memory.read(&mut bytes).is_ok_and(|length| length > 0)
    {
        got.push("mem: read at 0x400000".to_owned());
    }
    got
}

/// Reads each mapping that `maps` lists, and looks for words of the shim in what can be read.
fn read_mappings(memory: &mut File, pid: i32) -> Vec<String> {
    let maps = fs::read_to_string(path(pid, "maps")).unwrap_or_default();
    let mut first = None;
    let mut names = false;
    let mut readable = 0;
    for line in maps.lines() {
        let Some((start, length)) = range(line) else {
            continue;
        };
        let mut bytes = vec![0; length.min(1 << 24)];
        if memory.seek(SeekFrom::Start(start)).is_ok()
            && let Ok(length @ 1..) = memory.read(&mut bytes)
        {
            first.get_or_insert(line);
            // The kernel's own page, the same for every process.
            if !line.ends_with("[vsyscall]") {
                readable += length;
            }
            names |= has_words_of_the_shim(&bytes[..length]);
        }
    }
    let mut got = Vec::new();
    if let Some(line) = first {
        got.push(format!("mem: read at {line}"));
        got.push(format!("mem: bytes {readable}"));
    }
    if names {
        got.push("mem holds words of the shim".to_owned());
    }
    got
}

/// The start and the length of the mapping in a line of `maps`.
fn range(line: &str) -> Option<(u64, usize)> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    Some((start, usize::try_from(end - start).unwrap_or(0)))
}

fn has_words_of_the_shim(bytes: &[u8]) -> bool {
    ["containerd", "-shim-", "runc"].iter().any(|name| {
        bytes
            .windows(name.len())
            .any(|window| window == name.as_bytes())
    })
}

fn read_maps(pid: i32) -> Vec<String> {
    match fs::read_to_string(path(pid, "maps")) {
        Ok(maps) if !maps.is_empty() => vec!["maps".to_owned()],
        _ => Vec::new(),
    }
}

fn write_program(pid: i32) -> Vec<String> {
    let mut got = Vec::new();
    for mode in ["write", "append"] {
        let mut options = OpenOptions::new();
        let options = if mode == "write" {
            options.write(true)
        } else {
            options.append(true)
        };
        if let Ok(mut exe) = options.open(path(pid, "exe"))
            && exe.write(b"#!").is_ok()
        {
            got.push(format!("exe: {mode}"));
        }
    }
    got
}

fn find_program(pid: i32) -> Vec<String> {
    match fs::read_link(path(pid, "exe")) {
        Ok(link) if link.to_string_lossy().contains("shim") => {
            vec![format!("exe leads to {}", link.display())]
        }
        _ => Vec::new(),
    }
}

fn list_root(pid: i32) -> Vec<String> {
    let Ok(root) = fs::read_dir(path(pid, "root")) else {
        return Vec::new();
    };
    let names: Vec<_> = root
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    one_line("root", &names)
}

fn list_descriptors(pid: i32) -> Vec<String> {
    let Ok(fds) = fs::read_dir(path(pid, "fd")) else {
        return Vec::new();
    };
    let links: Vec<_> = fds
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|link| link.display().to_string())
        .filter(|link| link != "/dev/null")
        .collect();
    one_line("fd", &links)
}

/// One line with all words; none when there are no words.
fn one_line(what: &str, words: &[String]) -> Vec<String> {
    if words.is_empty() {
        Vec::new()
    } else {
        vec![format!("{what}: {}", words.join(" "))]
    }
}

fn trace(pid: i32) -> Vec<String> {
    // SAFETY: no pointers are passed; an attached process is detached again.
    unsafe {
        let none = std::ptr::null_mut::<libc::c_void>();
        if libc::ptrace(libc::PTRACE_SEIZE, pid, none, none) != 0 {
            return Vec::new();
        }
        libc::ptrace(libc::PTRACE_DETACH, pid, none, none);
    }
    vec!["ptrace".to_owned()]
}
