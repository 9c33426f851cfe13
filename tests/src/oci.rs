//! The tiny pause image: an OCI archive with nothing in it but the built-in pause program.
//!
//! ```text
//!  archive ── oci-layout
//!          ├─ index.json ── manifest, with the image's name ──┬─ config   entrypoint, user, architecture
//!          └─ blobs/sha256/…                                  └─ layer    a tar with /pause
//! ```
//! The same program always gives the same archive. OCI image-spec: image-layout.md.

use std::io;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// An image with this name for podsandbox mode.
///
/// # Errors
/// The error of writing an archive into memory.
pub fn pause_image(name: &str) -> io::Result<Vec<u8>> {
    let layer = tar(&[("pause", pause::PROGRAM, 0o555)])?;
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
        "architecture": architecture(),
        "os": "linux",
        "config": { "Entrypoint": ["/pause"], "User": "65535:65535", "WorkingDir": "/" },
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
    manifest["platform"] = json!({ "architecture": architecture(), "os": "linux" });
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

/// This machine's architecture as Go names it, and so the platform of an image.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        same => same,
    }
}
