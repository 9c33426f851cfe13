#![allow(clippy::unwrap_used, clippy::panic)]
use super::*;

const PROGRAM_BYTES: &[u8] = b"\x7fELF the program";
const CONFIG: &str = "/etc/containerd/config.toml";

/// As kubeadm's guide makes one with containerd 1.7: the defaults, with systemd's cgroups.
const KUBEADM_1: &str = r#"disabled_plugins = []
imports = []
version = 2

[plugins]

  [plugins."io.containerd.grpc.v1.cri"]
    sandbox_image = "registry.k8s.io/pause:3.9"
    [plugins."io.containerd.grpc.v1.cri".containerd]
      default_runtime_name = "runc"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes]

        [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
          runtime_type = "io.containerd.runc.v2"

          [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
            BinaryName = ""
            SystemdCgroup = true # by hand
"#;

/// As in kind's node images.
const KIND: &str = r#"# explicitly use v2 config format
version = 2

[proxy_plugins]
  # fuse-overlayfs is used for rootless
  [proxy_plugins."fuse-overlayfs"]
    type = "snapshot"
    address = "/run/containerd-fuse-overlayfs.sock"

[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "overlayfs"
  default_runtime_name = "runc"
  discard_unpacked_layers = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  base_runtime_spec = "/etc/containerd/cri-base.json"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
    SystemdCgroup = true
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.k8s.io/pause:3.10"
  tolerate_missing_hugetlb_controller = true
"#;

/// Debian's package.
const DEBIAN: &str = "version = 2

[plugins]
  [plugins.\"io.containerd.grpc.v1.cri\"]
    [plugins.\"io.containerd.grpc.v1.cri\".cni]
      bin_dir = \"/usr/lib/cni\"
      conf_dir = \"/etc/cni/net.d\"
  [plugins.\"io.containerd.internal.v1.opt\"]
    path = \"/var/lib/containerd\"
";

/// A node with this containerd and these files. The dump has the handler `runc` of the last file, as containerd would
/// print it, or containerd's own.
fn node(version: (u32, u32), files: &[(&str, &str)]) -> Found {
    let plugin = if version.0 < 2 {
        handler::CRI[1]
    } else {
        handler::CRI[0]
    };
    let mut runc: Table = toml::from_str(
        "runtime_type = 'io.containerd.runc.v2'\nruntime_path = ''\ncni_max_conf_num = 0\npod_annotations = []\n\
         [options]\nBinaryName = ''\nIoUid = 0\nSystemdCgroup = false\n",
    )
    .unwrap();
    let mut others = Table::new();
    for (_, text) in files {
        let table = text::parse(text).unwrap();
        let handlers = handler::cri_of(&table)
            .and_then(|cri| cri.get("containerd")?.get("runtimes")?.as_table().cloned())
            .unwrap_or_default();
        for (name, handler) in handlers {
            if name == "runc" {
                runc.extend(handler.as_table().unwrap().clone());
            } else {
                others.insert(name, handler);
            }
        }
    }
    others.insert("runc".into(), runc.into());
    let nested = |name: &str, inside: Table| -> Table {
        [(name.to_owned(), Value::Table(inside))]
            .into_iter()
            .collect()
    };
    let dump = nested(
        "plugins",
        nested(plugin, nested("containerd", nested("runtimes", others))),
    );
    Found {
        version: Version::of(version.0, version.1),
        config: CONFIG.into(),
        files: files
            .iter()
            .map(|(path, text)| (path.into(), (*text).to_owned()))
            .collect(),
        drop_in: None,
        dump,
        search_path: vec!["/usr/local/bin".into(), "/usr/bin".into()],
        kubelet: Some(Driver::Systemd),
        options: None,
        program: None,
    }
}

/// The node after the changes, as the next run finds it. 2.x reads what its file imports.
fn after(found: &Found, changes: &[Change]) -> Found {
    let mut files = found.files.clone();
    let drop_in = drop_in(found);
    if let Some(text) = &found.drop_in
        && !files.iter().any(|(path, _)| *path == drop_in)
    {
        files.push((drop_in.clone(), text.clone()));
    }
    let mut next = found.clone();
    for change in changes {
        let text = || {
            change
                .content
                .clone()
                .map(|content| String::from_utf8(content).unwrap())
        };
        if change.path == Path::new(PROGRAM) {
            next.program.clone_from(&change.content);
        } else if change.path == Path::new(DEFAULT_FILE) {
            next.options = text();
        } else {
            let place = files.iter().position(|(path, _)| *path == change.path);
            match (place, text()) {
                (Some(place), Some(text)) => files[place].1 = text,
                (Some(place), None) => drop(files.remove(place)),
                (None, Some(text)) => files.push((change.path.clone(), text)),
                (None, None) => panic!("{change:?}"),
            }
        }
    }
    next.drop_in = files
        .iter()
        .find_map(|(path, text)| (*path == drop_in).then(|| text.clone()));
    let main = files.iter().find(|(path, _)| *path == found.config);
    let imports = main.map_or(Vec::new(), |(_, text)| text::imports(text).unwrap());
    let here = found.config.parent().unwrap();
    files.retain(|(path, _)| {
        let imported = || {
            imports
                .iter()
                .any(|import| covers(&here.join(import), path))
        };
        *path == found.config || imported()
    });
    let borrowed: Vec<_> = files
        .iter()
        .map(|(path, text)| (path.to_str().unwrap(), text.as_str()))
        .collect();
    let version = (found.version.major, found.version.minor);
    Found {
        kubelet: found.kubelet,
        drop_in: next.drop_in,
        options: next.options,
        program: next.program,
        search_path: found.search_path.clone(),
        ..node(version, &borrowed)
    }
}

fn text_of<'a>(found: &'a Found, path: &str) -> &'a str {
    let file = found
        .files
        .iter()
        .find(|(known, _)| known == Path::new(path));
    &file.unwrap_or_else(|| panic!("no {path}: {found:?}")).1
}

fn refused(found: &Found) -> String {
    match install(found, PROGRAM_BYTES) {
        Err(Error::FailedPrecondition(why)) => why,
        other => panic!("{other:?}"),
    }
}

/// Each containerd with each of the files that people have.
fn nodes() -> Vec<Found> {
    let own = "/etc/containerd/own.toml";
    let mut nodes = Vec::new();
    for version in [(1, 6), (1, 7), (2, 0), (2, 1), (2, 3)] {
        nodes.push(node(version, &[]));
        for text in [KUBEADM_1, KIND, DEBIAN, "version = 2"] {
            nodes.push(node(version, &[(CONFIG, text)]));
            nodes.push(node(version, &[(CONFIG, &text.replace('\n', "\r\n"))]));
        }
        if version.0 < 2 {
            nodes.push(node(version, &[(CONFIG, "[plugins.cri]\n  x = 1\n")]));
            let main = format!(
                "version = 2\nimports = ['{own}']\n[plugins.'io.containerd.grpc.v1.cri']\n"
            );
            nodes.push(node(version, &[(CONFIG, &main), (own, KIND)]));
            nodes.push(node(
                version,
                &[(CONFIG, &main), (own, "version = 2\n[debug]\n")],
            ));
        } else {
            nodes.push(node(
                version,
                &[(
                    CONFIG,
                    "version = 3\nimports = ['/etc/containerd/conf.d/*.toml'] # all\n",
                )],
            ));
            nodes.push(node(
                version,
                &[(
                    CONFIG,
                    "imports = ['own.toml']\nversion = 4\n[debug]\nlevel = 'info'\n",
                )],
            ));
        }
    }
    nodes
}

#[test]
fn a_second_run_has_nothing_to_do_and_uninstall_leaves_every_file_as_before() {
    for found in nodes() {
        let changes = install(&found, PROGRAM_BYTES).unwrap();
        assert!(
            changes
                .iter()
                .any(|change| change.reader == Reader::Containerd)
        );
        let installed = after(&found, &changes);
        assert!(handler::is_listed(&installed.dump), "{:?}", installed.files);
        assert_eq!(installed.program.as_deref(), Some(PROGRAM_BYTES));
        assert_eq!(
            install(&installed, PROGRAM_BYTES).unwrap(),
            [],
            "{:?}",
            installed.files
        );

        let removed = after(&installed, &uninstall(&installed).unwrap());
        assert_eq!(removed.files, found.files);
        assert_eq!((removed.options, removed.program), (None, None));
        assert_eq!(
            uninstall(&found).unwrap(),
            [],
            "what is not there is not removed"
        );
    }
}

#[test]
fn a_new_binary_alone_restarts_nothing() {
    let found = node((2, 1), &[(CONFIG, KIND)]);
    let installed = after(&found, &install(&found, PROGRAM_BYTES).unwrap());
    let changes = install(&installed, b"\x7fELF newer").unwrap();
    let [change] = &changes[..] else {
        panic!("{changes:?}")
    };
    assert_eq!(
        (change.path.as_path(), change.reader, change.mode),
        (Path::new(PROGRAM), Reader::Pods, 0o755)
    );
}

#[test]
fn the_drop_in_has_the_version_of_the_file_that_imports_it() {
    for (text, version, plugin) in [
        (KUBEADM_1, 2, "io.containerd.grpc.v1.cri"),
        ("version = 3\n", 3, "io.containerd.cri.v1.runtime"),
        ("version = 4\n", 3, "io.containerd.cri.v1.runtime"),
    ] {
        let found = node((2, 1), &[(CONFIG, text)]);
        let installed = after(&found, &install(&found, PROGRAM_BYTES).unwrap());
        let drop_in = text_of(
            &installed,
            "/etc/containerd/conf.d/containerd-shim-pause-v2.toml",
        );
        assert_eq!(text::version(drop_in).unwrap(), version);
        assert!(
            drop_in.contains(&format!("[plugins.\"{plugin}\".containerd.runtimes.pause]")),
            "{drop_in}"
        );
        assert_eq!(
            text::version(text_of(&installed, CONFIG)).unwrap(),
            text::version(text).unwrap()
        );
    }
    let old = node((2, 1), &[(CONFIG, "# no version\nroot = '/x'\n")]);
    assert!(refused(&old).contains("containerd config migrate"));
}

#[test]
fn the_handler_is_as_the_nodes_runc_and_follows_the_kubelet() {
    let runc = "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\n\
                runtime_type = 'io.containerd.runc.v2'\nbase_runtime_spec = '/base.json'\n\
                pod_annotations = ['a.*']\nruntime_engine = '/old'\n\
                [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc.options]\n\
                BinaryName = '/usr/local/sbin/runc'\nSystemdCgroup = true\nCriuPath = '/criu'\nIoUid = 0\n";
    let mut found = node((2, 1), &[(CONFIG, runc)]);
    for (kubelet, systemd) in [
        (Some(Driver::Cgroupfs), false),
        (Some(Driver::Systemd), true),
        (None, true),
    ] {
        found.kubelet = kubelet;
        let installed = after(&found, &install(&found, PROGRAM_BYTES).unwrap());
        let drop_in = text::parse(text_of(
            &installed,
            "/etc/containerd/conf.d/containerd-shim-pause-v2.toml",
        ));
        let expected: Table = toml::from_str(&format!(
            "base_runtime_spec = '/base.json'\npod_annotations = ['a.*']\nruntime_type = 'io.containerd.runc.v2'\n\
             runtime_path = '{PROGRAM}'\n[options]\nBinaryName = '/usr/local/sbin/runc'\nSystemdCgroup = {systemd}\n"
        ))
        .unwrap();
        assert_eq!(
            handler::of_dump(&drop_in.unwrap(), HANDLER),
            Some(&expected)
        );
    }
}

#[test]
fn before_2_0_the_handler_stands_in_the_file_that_counts_with_a_runc_beside_it() {
    let own = "/etc/containerd/own.toml";
    let main =
        format!("version = 2\nimports = ['{own}']\n[plugins.'io.containerd.grpc.v1.cri']\nx = 1\n");
    let found = node((1, 7), &[(CONFIG, &main), (own, KIND)]);
    let changes = install(&found, PROGRAM_BYTES).unwrap();
    assert!(
        !changes
            .iter()
            .any(|change| change.path == Path::new(CONFIG))
    );
    let installed = after(&found, &changes);
    assert!(text_of(&installed, own).starts_with(KIND));
    assert_eq!(
        text_of(&installed, own).matches(".runtimes.runc]").count(),
        1
    );

    // Debian's file names no handler: 1.x forgets its own.
    let found = node((1, 6), &[(CONFIG, DEBIAN)]);
    let installed = after(&found, &install(&found, PROGRAM_BYTES).unwrap());
    let config = text_of(&installed, CONFIG);
    assert!(config.starts_with(DEBIAN));
    let table = text::parse(config).unwrap();
    let runc = handler::of_dump(&table, "runc").unwrap();
    assert_eq!(runc["runtime_type"].as_str(), Some("io.containerd.runc.v2"));
    let pause = handler::of_dump(&table, HANDLER).unwrap();
    assert_eq!(
        pause["runtime_type"].as_str(),
        Some("io.containerd.pause.v2")
    );
    assert!(!pause.contains_key("options"), "1.6 passes none on");
    assert!(
        installed
            .options
            .unwrap()
            .ends_with("\nSystemdCgroup = true\n")
    );

    let first = node((1, 7), &[(CONFIG, "[plugins.cri]\n  x = 1\n")]);
    let installed = after(&first, &install(&first, PROGRAM_BYTES).unwrap());
    assert!(text_of(&installed, CONFIG).contains("[plugins.cri.containerd.runtimes.pause]"));
}

#[test]
fn a_block_of_1_x_becomes_a_drop_in_of_2_x() {
    let old = node((1, 7), &[(CONFIG, KIND)]);
    let mut found = after(&old, &install(&old, PROGRAM_BYTES).unwrap());
    found.version = Version::of(2, 1);
    let upgraded = after(&found, &install(&found, PROGRAM_BYTES).unwrap());
    assert!(text::without_block(text_of(&upgraded, CONFIG)).is_none());
    let removed = after(&upgraded, &uninstall(&upgraded).unwrap());
    assert_eq!(text_of(&removed, CONFIG), KIND);

    // Also out of a file that is imported.
    let own = "/etc/containerd/own.toml";
    let main = "version = 2\nimports = ['own.toml']\n";
    let old = node((1, 7), &[(CONFIG, main), (own, KIND)]);
    let mut found = after(&old, &install(&old, PROGRAM_BYTES).unwrap());
    assert!(text::without_block(text_of(&found, own)).is_some());
    found.version = Version::of(2, 1);
    let upgraded = after(&found, &install(&found, PROGRAM_BYTES).unwrap());
    assert_eq!(text_of(&upgraded, own), KIND);
    let removed = after(&found, &uninstall(&found).unwrap());
    assert_eq!(removed.files, old.files);
}

#[test]
fn a_drop_in_that_is_not_read_gets_no_handler_and_is_removed() {
    let old = node((2, 1), &[(CONFIG, "version = 2\n")]);
    let old = after(&old, &install(&old, PROGRAM_BYTES).unwrap());
    assert!(old.drop_in.is_some());
    let mut found = node((1, 7), &[(CONFIG, KIND)]);
    found.drop_in.clone_from(&old.drop_in);
    let installed = after(&found, &install(&found, PROGRAM_BYTES).unwrap());
    assert!(text::without_block(text_of(&installed, CONFIG)).is_some());
    assert_eq!(installed.drop_in, old.drop_in);
    let removed = after(&installed, &uninstall(&installed).unwrap());
    assert_eq!((removed.files, removed.drop_in), (found.files, None));
}

#[test]
fn a_binary_that_somebody_elses_handler_needs_stays() {
    let by_hand = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.NAME]\n\
                   runtime_type = 'io.containerd.pause.v2'\n";
    let mut pause = node((2, 1), &[(CONFIG, &by_hand.replace("NAME", HANDLER))]);
    pause.program = Some(PROGRAM_BYTES.to_vec());
    assert_eq!(uninstall(&pause).unwrap(), []);
    let mut docker = node((2, 1), &[(CONFIG, KIND)]);
    docker.program = Some(PROGRAM_BYTES.to_vec());
    assert_eq!(uninstall(&docker).unwrap(), [], "put there for others");

    // 1.x takes a path for a type.
    let typed = format!(
        "{KIND}[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.mine]\nruntime_type = '{PROGRAM}'\n"
    );
    let typed = node((1, 7), &[(CONFIG, &typed)]);
    let installed = after(&typed, &install(&typed, PROGRAM_BYTES).unwrap());
    let removed = after(&installed, &uninstall(&installed).unwrap());
    assert_eq!(removed.program, installed.program);

    let other = node((2, 1), &[(CONFIG, &by_hand.replace("NAME", "pauseless"))]);
    let installed = after(&other, &install(&other, PROGRAM_BYTES).unwrap());
    let removed = after(&installed, &uninstall(&installed).unwrap());
    assert_eq!(removed.files, other.files);
    assert_eq!(removed.program, installed.program);
}

#[test]
fn what_cannot_be_done_is_refused_with_a_sentence() {
    assert!(refused(&node((1, 5), &[])).contains("1.6"));

    let mut off = node((1, 7), &[(CONFIG, "version = 2\n")]);
    off.dump
        .insert("disabled_plugins".into(), vec!["cri"].into());
    assert!(refused(&off).contains("disabled_plugins"));

    let by_hand = KIND.to_owned()
        + "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.pause]\nruntime_type = 'x'\n";
    for version in [(1, 7), (2, 1)] {
        assert!(refused(&node(version, &[(CONFIG, &by_hand)])).contains("stands already"));
    }

    let mut path = node((1, 6), &[(CONFIG, KIND)]);
    path.search_path = vec!["/usr/bin".into()];
    assert!(refused(&path).contains("PATH"));

    let inline = "version = 2\n[plugins]\n'io.containerd.grpc.v1.cri' = { containerd = { snapshotter = 'overlayfs' } }\n";
    assert!(refused(&node((1, 7), &[(CONFIG, inline)])).contains("cannot be added"));

    let mut options = node((1, 6), &[(CONFIG, KIND)]);
    options.options = Some("SystemdCgroup = false\n".to_owned());
    assert!(refused(&options).contains("SystemdCgroup = true"));
    options.options = Some("holder = 'process'\nSystemdCgroup = true\n".to_owned());
    let installed = after(&options, &install(&options, PROGRAM_BYTES).unwrap());
    assert_eq!(installed.options, options.options, "a person's file stays");
    let removed = after(&installed, &uninstall(&installed).unwrap());
    assert_eq!(removed.options, options.options);
}

#[test]
fn a_pattern_covers_a_file_of_its_folder() {
    let file = Path::new("/etc/containerd/conf.d/ours.toml");
    for (pattern, covered) in [
        ("/etc/containerd/conf.d/*.toml", true),
        ("/etc/containerd/conf.d/ours.toml", true),
        ("/etc/containerd/conf.d/ou*s.toml", true),
        ("/etc/containerd/conf.d/ours.toml*ours.toml", false),
        ("/etc/containerd/*.toml", false),
        ("/etc/containerd/conf.d/*.conf", false),
    ] {
        assert_eq!(covers(Path::new(pattern), file), covered, "{pattern}");
    }
}

#[test]
fn a_difference_is_named_and_ours_is_none() {
    let table = |text: &str| text::parse(text).unwrap();
    let before = table(
        "imports = []\nroot = '/r'\n[plugins.cri.containerd.runtimes.runc]\na = 1\nempty = ''\n[plugins.cri.containerd.runtimes.runc.options]\nz = 0\n",
    );
    let after = "imports = ['x']\nroot = '/r'\n[plugins.cri.containerd.runtimes.runc]\na = 1\n[plugins.cri.containerd.runtimes.pause]\nb = 1\n";
    assert_eq!(handler::difference(&before, &table(after)), None);
    for (from, to, key) in [
        ("a = 1", "a = 2", "plugins.cri.containerd.runtimes.runc.a"),
        (
            "runtimes.runc]",
            "runtimes.crun]",
            "plugins.cri.containerd.runtimes.runc",
        ),
        ("'/r'", "'/s'", "root"),
        ("root", "temp", "root"),
    ] {
        let found = handler::difference(&before, &table(&after.replace(from, to)));
        assert_eq!(found.as_deref(), Some(key));
    }
}
