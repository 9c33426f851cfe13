//! `images pause NAME FILE`, `images installer NAME FILE PROGRAM`: writes an image as an OCI archive. `make pause-image`
//! and `make installer-image` call it.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "it talks to a person"
)]

use std::fs;
use std::process::ExitCode;

use shim_tests::oci;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (name, file, image) = match words[..] {
        ["pause", name, file] => (name, file, oci::pause_image(name)),
        ["installer", name, file, program] => {
            let image = fs::read(program).and_then(|program| oci::installer_image(name, &program));
            (name, file, image)
        }
        _ => {
            eprintln!("usage: images pause NAME FILE | images installer NAME FILE PROGRAM");
            return ExitCode::FAILURE;
        }
    };
    let written = image.and_then(|image| {
        fs::write(file, &image)?;
        Ok(image.len())
    });
    match written {
        Ok(bytes) => {
            println!("{file}: {bytes} bytes");
            println!("import it on a node with:  ctr -n k8s.io images import {file}");
            println!("and in kind with:          kind load image-archive {file}");
            if words[0] == "pause" {
                println!(
                    "then name it in containerd's configuration (docs/pause-image.md): {name}"
                );
            } else {
                println!("then follow config/deploy/README.md, which names it: {name}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("write {file}: {error}");
            ExitCode::FAILURE
        }
    }
}
