//! The files of a node: containerd's configuration and the kubelet's.

use std::path::Path;

use super::assert_refused;
use crate::error::Error;
use crate::node::config::Config;
use crate::node::install::text;
use crate::node::kubelet::CgroupDriver;

/// containerd's configuration, as a dump that is read and as a file that is edited. Then the same as the kubelet's.
pub(super) fn node_files(data: &[u8]) {
    let Ok(file) = std::str::from_utf8(data) else {
        return;
    };
    let _ = CgroupDriver::parse(file);
    match Config::parse(file) {
        Ok(config) => {
            // The folders of the imports are the operator's; a fuzzer would have us list any folder of the machine.
            let none = Config {
                imports: Vec::new(),
                ..config
            };
            assert_eq!(none.files(Path::new("/a.toml")), [Path::new("/a.toml")]);
        }
        Err(error) => assert_refused(&error, "containerd's configuration"),
    }
    edits(file);
}

/// What is added is taken out again, and every byte is as before.
fn edits(file: &str) {
    const ENTRY: &str = "/etc/containerd/conf.d/added*.toml";
    let known = match text::imports(file) {
        Ok(known) => known,
        Err(error) => {
            assert!(matches!(error, Error::FailedPrecondition(_)), "{error:?}");
            return;
        }
    };
    if known.iter().any(|known| known == ENTRY) || text::without_block(file).is_some() {
        return;
    }
    let added = text::add_import(file, ENTRY).unwrap_or_default();
    let now = text::imports(&added).unwrap_or_default();
    assert_eq!(
        now.split_last(),
        Some((&ENTRY.to_owned(), &*known)),
        "{added:?}"
    );
    assert_eq!(text::version(&added).ok(), text::version(file).ok());
    assert_eq!(
        text::remove_import(&added, ENTRY).ok().as_deref(),
        Some(file)
    );
    let block = text::add_block(file, "[plugins.x]\n  y = 1\n");
    assert_eq!(
        text::without_block(&block).as_deref(),
        Some(file),
        "{block:?}"
    );
}
