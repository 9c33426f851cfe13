//! What an attacker with CAP_SYS_PTRACE gets at in another process. One line per thing that worked.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};

/// Tries everything on `pid` and says what worked, `nothing` when nothing did.
pub(crate) fn attack(pid: i32) -> String {
    let mut got = Vec::new();
    let path = |name: &str| format!("/proc/{pid}/{name}");

    // Reading the environment file may succeed; what counts is whether there is anything in it.
    if let Ok(environment) = fs::read(path("environ"))
        && !environment.iter().all(|&byte| byte == 0)
    {
        got.push(format!(
            "environ: {}",
            String::from_utf8_lossy(&environment).replace('\0', " ")
        ));
    }
    if let Ok(mut memory) = File::open(path("mem")) {
        let maps = fs::read_to_string(path("maps")).unwrap_or_default();
        let mut read = None;
        let mut names = false;
        let mut readable = 0;
        for line in maps.lines() {
            let range = line.split(' ').next().unwrap_or_default().split_once('-');
            let ends = range
                .map(|(start, end)| (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16)));
            let Some((Ok(start), Ok(end))) = ends else {
                continue;
            };
            let mut bytes = vec![0; usize::try_from(end - start).unwrap_or(0).min(1 << 24)];
            if memory.seek(SeekFrom::Start(start)).is_ok()
                && let Ok(length @ 1..) = memory.read(&mut bytes)
            {
                read.get_or_insert(line);
                // The kernel's own page, the same for every process.
                if !line.ends_with("[vsyscall]") {
                    readable += length;
                }
                names |= ["containerd", "-shim-", "runc"].iter().any(|name| {
                    bytes[..length]
                        .windows(name.len())
                        .any(|window| window == name.as_bytes())
                });
            }
        }
        if let Some(line) = read {
            got.push(format!("mem: read at {line}"));
            got.push(format!("mem: bytes {readable}"));
        }
        if names {
            got.push("mem holds words of the shim".to_owned());
        }
        // Without maps: the usual place of a static program.
        let mut bytes = [0; 16];
        if memory.seek(SeekFrom::Start(0x40_0000)).is_ok()
            && memory.read(&mut bytes).is_ok_and(|length| length > 0)
        {
            got.push("mem: read at 0x400000".to_owned());
        }
    }
    if let Ok(maps) = fs::read_to_string(path("maps"))
        && !maps.is_empty()
    {
        got.push("maps".to_owned());
    }
    for mode in ["write", "append"] {
        let mut options = OpenOptions::new();
        let options = if mode == "write" {
            options.write(true)
        } else {
            options.append(true)
        };
        if let Ok(mut exe) = options.open(path("exe"))
            && exe.write(b"#!").is_ok()
        {
            got.push(format!("exe: {mode}"));
        }
    }
    if let Ok(link) = fs::read_link(path("exe"))
        && link.to_string_lossy().contains("shim")
    {
        got.push(format!("exe leads to {}", link.display()));
    }
    if let Ok(root) = fs::read_dir(path("root")) {
        let names: Vec<_> = root
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        if !names.is_empty() {
            got.push(format!("root: {}", names.join(" ")));
        }
    }
    if let Ok(fds) = fs::read_dir(path("fd")) {
        let links: Vec<_> = fds
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .map(|link| link.display().to_string())
            .filter(|link| link != "/dev/null")
            .collect();
        if !links.is_empty() {
            got.push(format!("fd: {}", links.join(" ")));
        }
    }
    // SAFETY: no pointers are passed; a process that was attached to is let go again.
    unsafe {
        let none = std::ptr::null_mut::<libc::c_void>();
        if libc::ptrace(libc::PTRACE_SEIZE, pid, none, none) == 0 {
            got.push("ptrace".to_owned());
            libc::ptrace(libc::PTRACE_DETACH, pid, none, none);
        }
    }
    if got.is_empty() {
        "nothing".to_owned()
    } else {
        got.join("\n")
    }
}
