//! `pause-image NAME FILE`: writes the tiny pause image as an OCI archive. `make pause-image` calls it.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "it talks to a person"
)]

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, file] = &arguments[..] else {
        eprintln!("usage: pause-image NAME FILE");
        return ExitCode::FAILURE;
    };
    let written = shim_tests::oci::pause_image(name).and_then(|image| {
        std::fs::write(file, &image)?;
        Ok(image.len())
    });
    match written {
        Ok(bytes) => {
            println!(
                "{file}: {bytes} bytes, the pause program in it has {}",
                pause::PROGRAM.len()
            );
            println!("import it on a node with:  ctr -n k8s.io images import {file}");
            println!("and in kind with:          kind load image-archive {file}");
            println!("then name it in containerd's configuration (docs/pause-image.md): {name}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("write {file}: {error}");
            ExitCode::FAILURE
        }
    }
}
