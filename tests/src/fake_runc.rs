//! A compiled program named `runc` that writes each command down, and then is a real runc; or the same for crun. The program
//! can say that it is of another release of runc, and crash as Go programs do.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::lab;
use crate::until::{eventually, ok_if};

/// The program, in a folder of its own.
pub struct FakeRunc {
    program: PathBuf,
}

impl FakeRunc {
    /// Puts the program into `folder`, which is made. `real` is the runc or the crun that does the work.
    pub fn new(folder: &Path, real: &Path) -> Self {
        fs::create_dir_all(folder).unwrap();
        let fake = Self {
            program: folder.join(lab::program_name(real)),
        };
        fake.replace();
        fake.set("real", Some(real.to_str().unwrap()));
        fake
    }

    /// The path of the program.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Another file takes the place of the program, as in an upgrade.
    pub fn replace(&self) {
        let new = self.program.with_extension("new");
        fs::copy(lab::helper("fake-runc"), &new).unwrap();
        fs::rename(new, &self.program).unwrap();
    }

    /// What `--version` says; none for the real answer. Goes with [`Self::replace`]: a file does not change its answer.
    pub fn set_version(&self, version: Option<&str>) {
        self.set("version", version);
    }

    /// The command that crashes; none for no command.
    pub fn set_crash(&self, command: Option<&str>) {
        self.set("crashes", command);
    }

    fn set(&self, name: &str, value: Option<&str>) {
        let path = self.program.with_extension(name);
        match value {
            Some(value) => fs::write(path, value).unwrap(),
            None => fs::remove_file(path).unwrap(),
        }
    }

    /// The command lines since the last look.
    pub fn calls(&self) -> Vec<String> {
        let calls = self.program.with_extension("calls");
        let text = fs::read_to_string(&calls).unwrap_or_default();
        fs::write(calls, "").unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// Waits until a shim has the answer of `--version`, which shims keep in runc's root.
    #[track_caller]
    pub fn wait_until_asked(&self, root: &Path) {
        use std::os::unix::fs::MetadataExt;
        let file = fs::metadata(&self.program).unwrap();
        let answer = root.join(format!(".release-{}-{}", file.dev(), file.ino()));
        eventually(Duration::from_secs(20), || {
            ok_if(answer.exists(), || format!("no {}", answer.display()))
        });
    }
}
