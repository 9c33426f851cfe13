//! Images of one program as OCI archives: the tiny pause image, and the installer for a cluster.
//!
//! ```text
//!  archive ── oci-layout
//!          ├─ index.json ── manifest, with the image's name ──┬─ config   entrypoint, user, architecture
//!          └─ blobs/sha256/…                                  └─ layer    a tar with the program
//! ```
//! The same program always gives the same archive. OCI image-spec: image-layout.md.

use std::io;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// An image with this name for podsandbox mode: nothing but the built-in pause program.
///
/// # Errors
/// The error of writing an archive into memory.
pub fn pause_image(name: &str) -> io::Result<Vec<u8>> {
    of_one_program(name, ("pause", pause::PROGRAM), "65535:65535")
}

/// An image with this name whose entrypoint is the shim's binary, and that has nothing else: `config/deploy/` runs it.
///
/// # Errors
/// As [`pause_image`].
pub fn installer_image(name: &str, shim: &[u8]) -> io::Result<Vec<u8>> {
    of_one_program(name, ("containerd-shim-pause-v2", shim), "0:0")
}

fn of_one_program(name: &str, (file, program): (&str, &[u8]), user: &str) -> io::Result<Vec<u8>> {
    let architecture = architecture(program)?;
    let layer = tar(&[(file, program, 0o555)])?;
    let mut blobs = Vec::new();
    let mut add = |media_type: &str, content: Vec<u8>| -> Value {
        let digest: String = Sha256::digest(&content)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let descriptor = json!({
            "mediaType": format!("application/vnd.oci.image.{media_type}"),
            "digest": format!("sha256:{digest}"),
            "size": content.len(),
        });
        blobs.push((format!("blobs/sha256/{digest}"), content));
        descriptor
    };
    let layer = add("layer.v1.tar", layer);
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Entrypoint": [format!("/{file}")], "User": user, "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = add("config.v1+json", config.to_string().into_bytes());
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": [layer],
    });
    let mut manifest = add("manifest.v1+json", manifest.to_string().into_bytes());
    manifest["platform"] = json!({ "architecture": architecture, "os": "linux" });
    manifest["annotations"] = json!({
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": name,
    });
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] }).to_string();
    let layout = json!({ "imageLayoutVersion": "1.0.0" }).to_string();
    let mut files = vec![
        ("oci-layout", layout.as_bytes(), 0o444),
        ("index.json", index.as_bytes(), 0o444),
    ];
    files.extend(
        blobs
            .iter()
            .map(|(path, content)| (path.as_str(), content.as_slice(), 0o444)),
    );
    tar(&files)
}

fn tar(files: &[(&str, &[u8], u32)]) -> io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, content, mode) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        archive.append_data(&mut header, path, *content)?;
    }
    archive.into_inner()
}

/// The machine that a program is for, as Go names it, and so the platform of its image: `e_machine` of elf(5). The program
/// may be for another machine than this one.
fn architecture(program: &[u8]) -> io::Result<&'static str> {
    match (program.get(..4), program.get(18..20)) {
        (Some(b"\x7fELF"), Some([62, 0])) => Ok("amd64"),
        (Some(b"\x7fELF"), Some([183, 0])) => Ok("arm64"),
        _ => Err(io::Error::other(
            "the program is no ELF file for x86-64 or arm64",
        )),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;
    use std::io::Read;

    use super::*;

    fn files(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (entry.path().unwrap().display().to_string(), content)
        });
        entries.collect()
    }

    #[test]
    fn the_installers_image_is_the_binary_and_always_the_same() {
        // The head of an ELF file for arm64, wherever the test runs.
        let program = [b"\x7fELF".as_slice(), &[0; 14], &[183, 0], b"the shim"].concat();
        let image = installer_image("x/installer:1", &program).unwrap();
        assert_eq!(image, installer_image("x/installer:1", &program).unwrap());
        assert!(installer_image("x/installer:1", b"no program").is_err());
        let files = files(&image);
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap();
            &files[&format!("blobs/sha256/{}", digest.strip_prefix("sha256:").unwrap())]
        };
        let json = |content: &[u8]| serde_json::from_slice::<Value>(content).unwrap();
        let index = json(&files["index.json"]);
        let named = &index["manifests"][0];
        assert_eq!(
            named["annotations"]["io.containerd.image.name"],
            "x/installer:1"
        );
        let manifest = json(blob(named));
        let config = json(blob(&manifest["config"]));
        assert_eq!(
            config["config"]["Entrypoint"],
            json!(["/containerd-shim-pause-v2"])
        );
        assert_eq!(config["config"]["User"], "0:0");
        assert_eq!(config["architecture"], "arm64");
        assert_eq!(named["platform"]["architecture"], "arm64");
        let layer = self::files(blob(&manifest["layers"][0]));
        assert_eq!(
            layer,
            BTreeMap::from([("containerd-shim-pause-v2".to_owned(), program)])
        );
    }
}
