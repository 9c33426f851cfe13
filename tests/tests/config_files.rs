//! Every file in `config/` is loaded: the containerd files by the three supported containerd versions, the YAML files
//! by a parser. Values that must agree between files are compared.
//!
//! The statements of `config/README.md` on drop-ins are checked against the daemons, too.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// The containerd runtime handler, and the name of the RuntimeClass.
const HANDLER: &str = "pause";
/// containerd turns `io.containerd.NAME.VERSION` into `containerd-shim-NAME-VERSION`.
const RUNTIME_TYPE: &str = "io.containerd.pause.v2";
const PROGRAM: &str = "/usr/local/bin/containerd-shim-pause-v2";
const OPTIONS_FILE: &str = "/etc/containerd-shim-pause-v2/config.toml";

/// Every option of the shim, in the order of `config/pause.toml`.
const OPTIONS: [&str; 13] = [
    "SystemdCgroup",
    "holder",
    "BinaryName",
    "shortcuts",
    "sandbox_start_timeout",
    "Root",
    "NoPivotRoot",
    "NoNewKeyring",
    "ShimCgroup",
    "IoUid",
    "IoGid",
    "CriuImagePath",
    "CriuWorkPath",
];

// --- containerd ----------------------------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq)]
enum Containerd {
    V1_6,
    V1_7,
    V2_1,
}
use Containerd::{V1_6, V1_7, V2_1};

impl Containerd {
    fn version(self) -> &'static str {
        match self {
            V1_6 => "1.6",
            V1_7 => "1.7",
            V2_1 => "2.1",
        }
    }

    /// The table in a dump that holds the CRI settings.
    fn cri(self) -> &'static str {
        match self {
            V1_6 | V1_7 => "io.containerd.grpc.v1.cri",
            V2_1 => "io.containerd.cri.v1.runtime",
        }
    }

    /// `tests/lab/prepare` puts the daemons there.
    fn daemon(self) -> Result<PathBuf> {
        let set = |name| std::env::var_os(name).map(PathBuf::from);
        let target = || set("CARGO_TARGET_DIR").unwrap_or_else(|| root().join("target"));
        let lab = set("LAB_DIR").unwrap_or_else(|| target().join("lab"));
        let path = lab.join(self.version()).join("containerd");
        if !path.exists() {
            return Err(format!("{} is missing: run tests/lab/prepare", path.display()).into());
        }
        Ok(path)
    }

    /// What this version makes of a configuration file.
    fn dump(self, file: &Path) -> Result<Dump> {
        let output = Command::new(self.daemon()?)
            .arg("-c")
            .arg(file)
            .args(["config", "dump"])
            .output()?;
        if !output.status.success() {
            return Err(format!(
                "{self:?} {}: {}",
                file.display(),
                String::from_utf8_lossy(&output.stderr)
            )
            .into());
        }
        Ok(Dump {
            of: self,
            toml: toml::from_str(&String::from_utf8(output.stdout)?)?,
        })
    }

    /// Starts the daemon with `file` on directories of its own, until it has booted, and returns its log.
    fn boot(self, file: &Path) -> Result<String> {
        let dir = tempfile::tempdir()?;
        let path = |name: &str| dir.path().join(name).display().to_string();
        // Only what keeps this daemon away from the machine's own; the CRI settings all come from `file`.
        let main = format!(
            "version = 2\nimports = ['{}']\nroot = '{}'\nstate = '{}'\n\
             [grpc]\naddress = '{}'\n\
             [plugins.'io.containerd.internal.v1.opt']\npath = '{}'\n\
             [plugins.'io.containerd.nri.v1.nri']\ndisable = true\n",
            file.display(),
            path("root"),
            path("state"),
            path("containerd.sock"),
            path("opt"),
        );
        let main = if self == V2_1 {
            main.replace("version = 2", "version = 3")
        } else {
            main
        };
        fs::write(dir.path().join("main.toml"), main)?;

        let log = dir.path().join("log");
        let mut daemon = Command::new(self.daemon()?)
            .arg("-c")
            .arg(dir.path().join("main.toml"))
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .spawn()?;
        let end = Instant::now() + Duration::from_secs(30);
        let outcome = loop {
            let text = fs::read_to_string(&log)?;
            if text.contains("containerd successfully booted") {
                break Ok(text);
            }
            if daemon.try_wait()?.is_some() || Instant::now() > end {
                break Err(
                    format!("{self:?} did not boot with {}:\n{text}", file.display()).into(),
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        daemon.kill()?;
        daemon.wait()?;
        outcome
    }
}

/// The effective configuration of a daemon.
struct Dump {
    of: Containerd,
    toml: Value,
}

impl Dump {
    fn cri(&self) -> &Value {
        &self.toml["plugins"][self.of.cri()]
    }

    fn default_runtime(&self) -> &Value {
        &self.cri()["containerd"]["default_runtime_name"]
    }

    fn runtime(&self, name: &str) -> &Value {
        &self.cri()["containerd"]["runtimes"][name]
    }

    /// The handlers, sorted.
    fn runtimes(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.cri()["containerd"]["runtimes"]
            .as_object()
            .map(|table| table.keys().map(String::as_str).collect())
            .unwrap_or_default();
        names.sort_unstable();
        names
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or_else(|| Path::new("."))
}

fn config(name: &str) -> PathBuf {
    root().join("config").join(name)
}

/// A folder with `config.toml` = `main` and the given drop-in below `conf.d`.
fn etc(main: &str, dropin: &str) -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    fs::create_dir(dir.path().join("conf.d"))?;
    fs::write(dir.path().join("conf.d/pause.toml"), dropin)?;
    let imports = format!("imports = ['{}/conf.d/*.toml']", dir.path().display());
    fs::write(
        dir.path().join("config.toml"),
        main.replacen("IMPORTS", &imports, 1),
    )?;
    Ok(dir)
}

/// A node's configuration in which an operator has changed something: a CNI folder, and a handler.
fn operators_config(version: u8) -> String {
    let cri = if version == 2 {
        "io.containerd.grpc.v1.cri"
    } else {
        "io.containerd.cri.v1.runtime"
    };
    format!(
        "version = {version}\nIMPORTS\n\
         [plugins.'{cri}'.cni]\nconf_dir = '/operator/cni'\n\
         [plugins.'{cri}'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n\
         [plugins.'{cri}'.containerd.runtimes.kata]\nruntime_type = 'io.containerd.kata.v2'\n"
    )
}

const FILES: [(Containerd, &str); 8] = [
    (V1_6, "containerd-1.toml"),
    (V1_6, "containerd-1-dropin.toml"),
    (V1_7, "containerd-1.toml"),
    (V1_7, "containerd-1-dropin.toml"),
    (V1_7, "containerd-1-runtime-path.toml"),
    (V2_1, "containerd-2.toml"),
    (V2_1, "containerd-2-dropin.toml"),
    (V2_1, "containerd-2-runtime-path.toml"),
];

#[test]
fn the_sandbox_api_is_a_handler_of_its_own_without_options() -> Result {
    let dump = V2_1.dump(&config("containerd-2-sandbox-api.toml"))?;
    let pauseless = dump.runtime("pauseless");
    assert_eq!(pauseless["runtime_type"], RUNTIME_TYPE);
    assert_eq!(pauseless["sandboxer"], "shim");
    let options = pauseless["options"].as_object().cloned();
    assert!(
        options.unwrap_or_default().is_empty(),
        "a table keeps 2.0 to 2.2 from starting containers"
    );
    assert_ne!(
        dump.default_runtime(),
        "pauseless",
        "2.0 to 2.2 crash on pods with the node's network"
    );
    assert_eq!(dump.runtimes(), ["pauseless", "runc"]);
    Ok(())
}

#[test]
fn every_containerd_file_gives_the_handler_pause_and_keeps_runc() -> Result {
    for (containerd, name) in FILES {
        let dump = containerd.dump(&config(name))?;
        let case = format!("{containerd:?} {name}");
        let pause = dump.runtime(HANDLER);
        let by_path = name.contains("runtime-path");
        assert_eq!(
            pause["runtime_type"],
            if by_path {
                "io.containerd.runc.v2"
            } else {
                RUNTIME_TYPE
            },
            "{case}"
        );
        assert_eq!(
            pause["runtime_path"],
            if by_path { PROGRAM } else { "" },
            "{case}"
        );
        // Everywhere else the fixed options file must stay in force, and any table would switch it off.
        let options = pause["options"].as_object().cloned().unwrap_or_default();
        assert_eq!(options.is_empty(), !by_path, "{case}: {options:?}");
        if by_path {
            assert_eq!(options["SystemdCgroup"], true, "{case}");
        }
        assert_eq!(dump.runtimes(), [HANDLER, "runc"], "{case}");
        assert_eq!(
            dump.runtime("runc")["runtime_type"],
            "io.containerd.runc.v2",
            "{case}"
        );
    }
    Ok(())
}

#[test]
fn the_whole_files_send_every_pod_through_the_shim_and_the_drop_ins_do_not() -> Result {
    for (containerd, name) in FILES {
        let whole = matches!(name, "containerd-1.toml" | "containerd-2.toml");
        let expected = if whole { HANDLER } else { "runc" };
        assert_eq!(
            containerd.dump(&config(name))?.default_runtime(),
            expected,
            "{containerd:?} {name}"
        );
    }
    Ok(())
}

#[test]
fn the_commented_settings_of_the_containerd_files_load_too() -> Result {
    for (containerd, name) in FILES {
        let text = fs::read_to_string(config(name))?;
        // A comment is "# text"; a setting that is switched off has no space after the sign.
        let on: Vec<_> = text
            .lines()
            .map(|line| {
                line.trim_start()
                    .strip_prefix('#')
                    .filter(|rest| !rest.starts_with(' '))
                    .unwrap_or(line)
            })
            .collect();
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("all.toml");
        fs::write(&file, on.join("\n"))?;
        let dump = containerd.dump(&file)?;
        let case = format!("{containerd:?} {name}");
        assert_eq!(dump.default_runtime(), HANDLER, "{case}");
        let options = &dump.runtime(HANDLER)["options"];
        match name {
            "containerd-1.toml" => {
                assert_eq!(
                    options["ConfigPath"], "/etc/containerd-shim-pause-v2/other.toml",
                    "{case}"
                );
            }
            // Our own option is among runc's, and containerd keeps it.
            "containerd-2.toml" => assert_eq!(options["holder"], "process", "{case}"),
            _ => {}
        }
    }
    Ok(())
}

#[test]
fn containerd_boots_with_cri_on_every_file() -> Result {
    for (containerd, name) in FILES {
        let log = containerd.boot(&config(name))?;
        let case = format!("{containerd:?} {name}:\n{log}");
        // CRI logs its settings when it starts.
        let handler = if name.contains("runtime-path") {
            PROGRAM
        } else {
            RUNTIME_TYPE
        };
        let started = log
            .lines()
            .any(|line| line.to_lowercase().contains("cri plugin") && line.contains(handler));
        assert!(started, "CRI did not start with our handler. {case}");
        let refused = log
            .lines()
            .any(|line| line.contains("failed to load plugin") && line.contains(containerd.cri()));
        assert!(!refused, "{case}");
    }
    Ok(())
}

#[test]
fn on_1_6_and_1_7_a_drop_in_replaces_the_operators_cri_settings() -> Result {
    for containerd in [V1_6, V1_7] {
        for name in ["containerd-1-dropin.toml", "containerd-1-runtime-path.toml"] {
            let etc = etc(&operators_config(2), &fs::read_to_string(config(name))?)?;
            let dump = containerd.dump(&etc.path().join("config.toml"))?;
            assert_eq!(dump.runtimes(), [HANDLER, "runc"], "{containerd:?} {name}");
            assert_eq!(
                dump.cri()["cni"]["conf_dir"],
                "/etc/cni/net.d",
                "{containerd:?} {name}"
            );
        }
    }
    Ok(())
}

#[test]
fn on_2_1_a_drop_in_is_merged_into_the_operators_settings() -> Result {
    for name in ["containerd-2-dropin.toml", "containerd-2-runtime-path.toml"] {
        let etc = etc(&operators_config(3), &fs::read_to_string(config(name))?)?;
        let dump = V2_1.dump(&etc.path().join("config.toml"))?;
        assert_eq!(dump.runtimes(), ["kata", HANDLER, "runc"], "{name}");
        assert_eq!(dump.cri()["cni"]["conf_dir"], "/operator/cni", "{name}");
        assert_eq!(dump.default_runtime(), "runc", "{name}");
    }
    Ok(())
}

#[test]
fn on_2_1_a_drop_in_must_have_the_version_of_the_main_file() -> Result {
    let v3 = fs::read_to_string(config("containerd-2-dropin.toml"))?;
    // The change that the drop-in's comment names.
    let v2 = v3
        .replace("version = 3", "version = 2")
        .replace(V2_1.cri(), V1_7.cri());
    let runtimes = |main: u8, dropin: &str| -> Result<Vec<String>> {
        let etc = etc(&operators_config(main), dropin)?;
        let dump = V2_1.dump(&etc.path().join("config.toml"))?;
        Ok(dump.runtimes().into_iter().map(str::to_owned).collect())
    };
    assert_eq!(runtimes(3, &v3)?, ["kata", HANDLER, "runc"]);
    assert_eq!(runtimes(2, &v2)?, ["kata", HANDLER, "runc"]);
    assert_eq!(
        runtimes(2, &v3)?,
        [HANDLER, "runc"],
        "the main file's handlers are lost"
    );
    assert_eq!(
        runtimes(3, &v2)?,
        ["kata", "runc"],
        "the drop-in's handler is lost"
    );
    Ok(())
}

#[test]
fn on_1_6_and_1_7_a_runtimes_table_without_runc_keeps_cri_from_starting() -> Result {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("no-runc.toml");
    fs::write(
        &file,
        format!(
            "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.{HANDLER}]\n\
             runtime_type = '{RUNTIME_TYPE}'\n"
        ),
    )?;
    for containerd in [V1_6, V1_7] {
        let log = containerd.boot(&file)?;
        let refused = log
            .lines()
            .any(|line| line.contains("failed to load plugin") && line.contains(containerd.cri()));
        assert!(refused, "{containerd:?}:\n{log}");
    }
    Ok(())
}

#[test]
fn on_1_6_a_version_3_file_is_read_and_its_cri_settings_are_ignored_and_1_7_refuses_it() -> Result {
    assert_eq!(
        V1_6.dump(&config("containerd-2.toml"))?.runtimes(),
        ["runc"]
    );
    let Err(refused) = V1_7.dump(&config("containerd-2.toml")) else {
        return Err("1.7 took a version 3 file".into());
    };
    assert!(refused.to_string().contains("version"), "{refused}");
    Ok(())
}

// --- the shim's options --------------------------------------------------------------------------------------------

#[test]
fn pause_toml_sets_systemd_cgroup_and_names_every_other_option_in_a_comment() -> Result {
    let text = fs::read_to_string(config("pause.toml"))?;
    let set: Value = toml::from_str(&text)?;
    assert_eq!(set, serde_json::json!({ "SystemdCgroup": true }));

    let mut named = Vec::new();
    let mut all = String::new();
    for line in text.lines() {
        let setting = line.trim_start_matches("# ");
        if let Some((key, _)) = setting
            .split_once(" = ")
            .filter(|(key, _)| !key.contains(' '))
        {
            named.push(key);
            all.push_str(setting);
            all.push('\n');
        }
    }
    assert_eq!(named, OPTIONS);
    toml::from_str::<Value>(&all)?;
    Ok(())
}

#[test]
fn the_readme_has_a_line_for_every_option() -> Result {
    // The page of the options, which the README links.
    let page = fs::read_to_string(root().join("docs/options.md"))?;
    for option in OPTIONS {
        assert!(
            page.contains(&format!("| `{option}` |")),
            "docs/options.md has no line for {option}"
        );
    }
    assert!(page.contains(OPTIONS_FILE));
    Ok(())
}

#[test]
fn each_row_of_the_ways_is_a_test_and_each_test_is_a_row() -> Result {
    let page = fs::read_to_string(config("README.md"))?;
    let ways = fs::read_to_string(root().join("tests/tests/ways.rs"))?;
    let rows = || page.lines().filter(|line| line.starts_with("| "));
    let named = |test: &str| rows().any(|row| row.contains(&format!("`{test}`")));
    let tests = ways.lines().filter_map(|line| {
        let name = line
            .trim()
            .strip_prefix("fn by_")?
            .split_once("(version)")?
            .0;
        Some(format!("by_{name}"))
    });
    let tests: Vec<String> = tests.collect();
    for test in &tests {
        assert!(named(test), "config/README.md has no row for {test}");
    }
    let in_rows = rows().filter(|row| row.contains("| `by_")).count();
    assert_eq!(in_rows, tests.len());
    Ok(())
}

// --- kind and Kubernetes -------------------------------------------------------------------------------------------

/// The documents of a YAML file.
fn yaml(name: &str) -> Result<Vec<Value>> {
    use serde::Deserialize as _;
    let text = fs::read_to_string(config(name))?;
    let documents = serde_yaml_ng::Deserializer::from_str(&text).map(Value::deserialize);
    Ok(documents.collect::<std::result::Result<_, _>>()?)
}

fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Result<&'a Value> {
    let found = documents.iter().find(|document| document["kind"] == kind);
    Ok(found.ok_or_else(|| format!("no {kind}"))?)
}

fn list<'a>(value: &'a Value, what: &str) -> Result<&'a Vec<Value>> {
    Ok(value[what]
        .as_array()
        .ok_or_else(|| format!("{what} is not a list in {value}"))?)
}

#[test]
fn the_runtime_class_leads_to_the_handler_and_the_pods_ask_for_it() -> Result {
    let class = yaml("runtimeclass.yaml")?;
    let class = of_kind(&class, "RuntimeClass")?;
    assert_eq!(class["apiVersion"], "node.k8s.io/v1");
    assert_eq!(class["handler"], HANDLER);

    let name = &class["metadata"]["name"];
    assert_eq!(
        &of_kind(&yaml("pod.yaml")?, "Pod")?["spec"]["runtimeClassName"],
        name
    );
    for file in ["web.yaml", "kube-ops-view.yaml"] {
        let documents = yaml(file)?;
        assert_eq!(
            &of_kind(&documents, "Deployment")?["spec"]["template"]["spec"]["runtimeClassName"],
            name,
            "{file}"
        );
    }
    Ok(())
}

#[test]
fn the_example_pod_is_nginx_and_a_client_that_fetches_its_page() -> Result {
    let documents = yaml("pod.yaml")?;
    let pod = of_kind(&documents, "Pod")?;
    let containers = list(&pod["spec"], "containers")?;
    let images: Vec<_> = containers
        .iter()
        .map(|container| &container["image"])
        .collect();
    assert_eq!(images, ["nginx", "nicolaka/netshoot"]);
    assert_eq!(containers[0]["ports"][0]["containerPort"], 80);
    assert!(containers[1]["args"].to_string().contains("curl localhost"));
    Ok(())
}

#[test]
fn the_kind_cluster_has_two_nodes_which_mount_the_program_and_its_options() -> Result {
    let documents = yaml("kind.yaml")?;
    let cluster = of_kind(&documents, "Cluster")?;
    assert_eq!(cluster["apiVersion"], "kind.x-k8s.io/v1alpha4");
    let nodes = list(cluster, "nodes")?;
    let roles: Vec<_> = nodes.iter().map(|node| &node["role"]).collect();
    assert_eq!(roles, ["control-plane", "worker"]);

    let makefile = fs::read_to_string(root().join("Makefile"))?;
    for node in nodes {
        let mounts = list(node, "extraMounts")?;
        let paths: Vec<_> = mounts.iter().map(|mount| &mount["containerPath"]).collect();
        assert_eq!(paths, [PROGRAM, OPTIONS_FILE]);
        assert!(mounts.iter().all(|mount| mount["readOnly"] == true));
        // What `make build` makes, and a file of this folder; both relative to the project's root.
        let program = mounts[0]["hostPath"]
            .as_str()
            .and_then(|path| path.strip_prefix("./"))
            .unwrap_or_default();
        assert!(
            makefile.contains(program) && !program.is_empty(),
            "`make build` does not make {program}"
        );
        assert_eq!(mounts[1]["hostPath"], "./config/pause.toml");
    }
    Ok(())
}

#[test]
fn the_kind_patch_makes_every_pod_use_the_mounted_program() -> Result {
    let documents = yaml("kind.yaml")?;
    let patches = list(of_kind(&documents, "Cluster")?, "containerdConfigPatches")?;
    let patch = patches[0].as_str().unwrap_or_default();
    assert_eq!(patches.len(), 1);

    // What kind does: it merges the patch into the node's configuration, of which this is a stand-in.
    let node = "version = 2\n\
        [plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = 'registry.k8s.io/pause:3.10'\n\
        [plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'overlayfs'\n\
        [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n\
        [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc.options]\nSystemdCgroup = true\n";
    let mut merged: toml::Table = toml::from_str(node)?;
    merge(&mut merged, toml::from_str(patch)?);
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("config.toml");
    fs::write(&file, toml::to_string(&merged)?)?;
    for containerd in [V1_7, V2_1] {
        let dump = containerd.dump(&file)?;
        assert_eq!(dump.default_runtime(), HANDLER, "{containerd:?}");
        assert_eq!(dump.runtimes(), [HANDLER, "runc"], "{containerd:?}");
        let runtime = dump.runtime(HANDLER);
        assert_eq!(runtime["runtime_type"], RUNTIME_TYPE, "{containerd:?}");
        assert_eq!(
            runtime["base_runtime_spec"], "/etc/containerd/cri-base.json",
            "{containerd:?}"
        );
    }
    Ok(())
}

#[test]
fn the_installer_runs_where_its_runtime_class_sends_pods() -> Result {
    let documents = yaml("deploy/base/daemonset.yaml")?;
    let installer = of_kind(&documents, "DaemonSet")?;
    let namespace = yaml("deploy/base/namespace.yaml")?;
    assert_eq!(
        installer["metadata"]["namespace"],
        namespace[0]["metadata"]["name"]
    );
    let template = &installer["spec"]["template"];
    assert_eq!(
        installer["spec"]["selector"]["matchLabels"],
        template["metadata"]["labels"]
    );
    let pod = &template["spec"];
    let class = yaml("deploy/base/runtimeclass.yaml")?;
    assert_eq!(class[0]["handler"], HANDLER);
    assert_eq!(class[0]["scheduling"]["nodeSelector"], pod["nodeSelector"]);

    // The first needs the node's PID 1 and its mounts. The second, which runs for ever, needs nothing.
    assert_eq!(pod["hostPID"], true);
    let (first, stay) = (
        &list(pod, "initContainers")?[0],
        &list(pod, "containers")?[0],
    );
    assert_eq!(first["args"], serde_json::json!(["install"]));
    assert_eq!(first["securityContext"]["privileged"], true);
    assert_eq!(stay["args"], serde_json::json!(["stay"]));
    assert_eq!(stay["securityContext"]["runAsNonRoot"], true);
    assert_eq!(
        stay["securityContext"]["capabilities"]["drop"],
        serde_json::json!(["ALL"])
    );

    // `make installer-image` gives the image the name that both ask for.
    let image = first["image"].as_str().unwrap_or_default();
    assert_eq!(stay["image"], image);
    // CRI looks for a name without a host below docker.io, and `ctr images import` takes the name as it is.
    assert!(image.starts_with("localhost/"), "{image}");
    let makefile = fs::read_to_string(root().join("Makefile"))?;
    assert!(
        makefile.contains(&format!("INSTALLER ?= {image}\n")),
        "{image}"
    );

    let overlay = yaml("deploy/uninstall/kustomization.yaml")?;
    let patches = list(&overlay[0], "patches")?;
    let operations: Value =
        serde_yaml_ng::from_str(patches[0]["patch"].as_str().unwrap_or_default())?;
    let path = "/spec/template/spec/initContainers/0/args";
    assert_eq!(
        operations,
        serde_json::json!([{ "op": "replace", "path": path, "value": ["uninstall"] }])
    );
    assert!(installer.pointer(path).is_some());
    assert_eq!(patches[0]["target"]["name"], installer["metadata"]["name"]);
    for file in list(&yaml("deploy/base/kustomization.yaml")?[0], "resources")? {
        let file = file.as_str().unwrap_or_default();
        assert!(config("deploy/base").join(file).exists(), "{file}");
    }
    Ok(())
}

#[test]
fn the_node_ports_are_the_ones_that_kind_maps_to_the_worker() -> Result {
    let documents = yaml("kind.yaml")?;
    let worker = &list(of_kind(&documents, "Cluster")?, "nodes")?[1];
    let mappings = list(worker, "extraPortMappings")?;
    for mapping in mappings {
        assert_eq!(mapping["containerPort"], mapping["hostPort"]);
        assert_eq!(mapping["protocol"], "tcp");
    }
    let mapped: Vec<_> = mappings
        .iter()
        .map(|mapping| &mapping["containerPort"])
        .collect();
    assert_eq!(mapped, [31000, 31001]);

    for (file, node_port) in [("kube-ops-view.yaml", 31000), ("web.yaml", 31001)] {
        let documents = yaml(file)?;
        let service = &of_kind(&documents, "Service")?["spec"];
        let template = &of_kind(&documents, "Deployment")?["spec"]["template"];
        assert_eq!(service["type"], "NodePort", "{file}");
        assert_eq!(service["ports"][0]["nodePort"], node_port, "{file}");
        assert_eq!(
            service["selector"], template["metadata"]["labels"],
            "{file}"
        );
        let container = &template["spec"]["containers"][0];
        assert_eq!(
            service["ports"][0]["targetPort"], container["ports"][0]["containerPort"],
            "{file}"
        );
    }
    Ok(())
}

#[test]
fn kube_ops_view_may_read_what_it_shows() -> Result {
    let documents = yaml("kube-ops-view.yaml")?;
    let account = &of_kind(&documents, "ServiceAccount")?["metadata"];
    let pod = &of_kind(&documents, "Deployment")?["spec"]["template"]["spec"];
    assert_eq!(pod["serviceAccountName"], account["name"]);
    let binding = of_kind(&documents, "ClusterRoleBinding")?;
    assert_eq!(binding["subjects"][0]["name"], account["name"]);
    assert_eq!(binding["subjects"][0]["namespace"], account["namespace"]);
    let role = of_kind(&documents, "ClusterRole")?;
    assert_eq!(binding["roleRef"]["name"], role["metadata"]["name"]);
    assert_eq!(
        role["rules"][0]["resources"],
        serde_json::json!(["nodes", "pods"])
    );
    Ok(())
}

/// Tables are merged, anything else is replaced.
fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => merge(old, new),
            (_, value) => drop(into.insert(key, value)),
        }
    }
}
