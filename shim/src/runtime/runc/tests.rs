#![allow(clippy::unwrap_used)]
use std::os::unix::fs::PermissionsExt;

use super::*;

#[tokio::test(start_paused = true)]
async fn a_delete_that_hangs_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("hangs");
    std::fs::write(&program, "#!/bin/sh\nexec sleep 3600\n").unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let options = Options {
        binary_name: program,
        ..Options::default()
    };
    let exits = Exits::watch().unwrap();
    let runc = Runc::new("c1", dir.path(), "default", &options, &exits);
    let (began, error) = (tokio::time::Instant::now(), runc.delete(None).await);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("still ran after 45s"), "{error}");
    // Once without --force and once with.
    assert_eq!(began.elapsed().as_secs(), 2 * DELETE.as_secs());
}

#[tokio::test]
async fn a_runc_that_is_not_there_is_named_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let exits = Exits::watch().unwrap();
    let options = Options {
        binary_name: "/nowhere/runc".into(),
        ..Options::default()
    };
    let runc = Runc::new("c1", dir.path(), "default", &options, &exits);
    let error = runc
        .start(std::future::pending())
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/nowhere/runc") && error.contains("BinaryName"),
        "{error}"
    );
}
