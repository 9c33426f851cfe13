//! Reads a pod's config from `CreateSandbox`: the message `runtime.v1.PodSandboxConfig` of the Kubernetes CRI. The field
//! numbers are those of cri-api's `api.proto`.

use containerd_shim_protos::protobuf;
use containerd_shim_protos::protobuf::well_known_types::any::Any;

use crate::containerd::convert::type_name;
use crate::containerd::wire::{self, Field};
use crate::error::{Error, Result};
use crate::pod::config::{
    Dns, IdMapping, Linux, Metadata, NamespaceOptions, PodConfig, PortMapping, Resources, Security,
    UserNamespace,
};

/// The full name of the message's type.
const TYPE: &str = "runtime.v1.PodSandboxConfig";

/// Reads the options of `CreateSandbox`.
///
/// # Errors
/// `InvalidArgument` for missing options, for options of another type, and for bytes that do not decode.
pub fn from_any(any: Option<&Any>) -> Result<PodConfig> {
    let any = any.ok_or_else(|| {
        Error::InvalidArgument(format!(
            "create a sandbox: without options, expected {TYPE}"
        ))
    })?;
    if type_name(any) != TYPE {
        return Err(Error::InvalidArgument(format!(
            "create a sandbox: options of type {:?}, expected {TYPE}",
            any.type_url
        )));
    }
    wire::decode(&any.value, pod)
        .map_err(|e| Error::InvalidArgument(format!("create a sandbox: decode {TYPE}: {e}")))
}

fn pod(message: &mut PodConfig, field: Field<'_, '_>) -> protobuf::Result<()> {
    match field.number {
        1 => field.message(message.metadata.get_or_insert_default(), metadata)?,
        2 => message.hostname = field.string()?,
        3 => message.log_directory = field.string()?,
        4 => field.message(message.dns_config.get_or_insert_default(), dns)?,
        5 => field.element(&mut message.port_mappings, port_mapping)?,
        6 => field.entry(&mut message.labels)?,
        7 => field.entry(&mut message.annotations)?,
        8 => field.message(message.linux.get_or_insert_default(), linux)?,
        _ => field.skip()?,
    }
    Ok(())
}

fn metadata(message: &mut Metadata, field: Field<'_, '_>) -> protobuf::Result<()> {
    match field.number {
        1 => message.name = field.string()?,
        2 => message.uid = field.string()?,
        3 => message.namespace = field.string()?,
        4 => message.attempt = field.uint32()?,
        _ => field.skip()?,
    }
    Ok(())
}

fn dns(message: &mut Dns, field: Field<'_, '_>) -> protobuf::Result<()> {
    match field.number {
        1 => message.servers.push(field.string()?),
        2 => message.searches.push(field.string()?),
        3 => message.options.push(field.string()?),
        _ => field.skip()?,
    }
    Ok(())
}

fn port_mapping(message: &mut PortMapping, field: Field<'_, '_>) -> protobuf::Result<()> {
    match field.number {
        1 => message.protocol = field.int32()?,
        2 => message.container_port = field.int32()?,
        3 => message.host_port = field.int32()?,
        4 => message.host_ip = field.string()?,
        _ => field.skip()?,
    }
    Ok(())
}

fn linux(message: &mut Linux, field: Field<'_, '_>) -> protobuf::Result<()> {
    match field.number {
        1 => message.cgroup_parent = field.string()?,
        2 => field.message(message.security_context.get_or_insert_default(), security)?,
        3 => field.entry(&mut message.sysctls)?,
        4 => field.message(message.overhead.get_or_insert_default(), resources)?,
        5 => field.message(message.resources.get_or_insert_default(), resources)?,
        _ => field.skip()?,
    }
    Ok(())
}

fn security(message: &mut Security, field: Field<'_, '_>) -> protobuf::Result<()> {
    match field.number {
        1 => field.message(
            message.namespace_options.get_or_insert_default(),
            namespaces,
        )?,
        6 => message.privileged = field.bool()?,
        _ => field.skip()?,
    }
    Ok(())
}

fn namespaces(message: &mut NamespaceOptions, field: Field<'_, '_>) -> protobuf::Result<()> {
    match field.number {
        1 => message.network = field.int32()?.into(),
        2 => message.pid = field.int32()?.into(),
        3 => message.ipc = field.int32()?.into(),
        5 => field.message(
            message.userns_options.get_or_insert_default(),
            user_namespace,
        )?,
        _ => field.skip()?,
    }
    Ok(())
}

fn user_namespace(message: &mut UserNamespace, field: Field<'_, '_>) -> protobuf::Result<()> {
    match field.number {
        1 => message.mode = field.int32()?.into(),
        2 => field.element(&mut message.uids, id_mapping)?,
        3 => field.element(&mut message.gids, id_mapping)?,
        _ => field.skip()?,
    }
    Ok(())
}

fn id_mapping(message: &mut IdMapping, field: Field<'_, '_>) -> protobuf::Result<()> {
    match field.number {
        1 => message.host_id = field.uint32()?,
        2 => message.container_id = field.uint32()?,
        3 => message.length = field.uint32()?,
        _ => field.skip()?,
    }
    Ok(())
}

fn resources(message: &mut Resources, field: Field<'_, '_>) -> protobuf::Result<()> {
    match field.number {
        1 => message.cpu_period = field.int64()?,
        2 => message.cpu_quota = field.int64()?,
        3 => message.cpu_shares = field.int64()?,
        4 => message.memory_limit_in_bytes = field.int64()?,
        _ => field.skip()?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use containerd_shim_protos::protobuf::CodedOutputStream;

    fn message(write: impl FnOnce(&mut CodedOutputStream<'_>) -> protobuf::Result<()>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut output = CodedOutputStream::vec(&mut bytes);
        write(&mut output).unwrap();
        output.flush().unwrap();
        drop(output);
        bytes
    }

    fn entry(key: &str, value: &str) -> Vec<u8> {
        message(|entry| {
            entry.write_string(1, key)?;
            entry.write_string(2, value)
        })
    }

    fn mapping(host: u32) -> Vec<u8> {
        message(|mapping| {
            mapping.write_uint32(1, host)?;
            mapping.write_uint32(3, 65_536)
        })
    }

    /// `LinuxSandboxSecurityContext`, with fields that the shim does not read.
    fn security(mode: i32) -> Vec<u8> {
        let user = message(|user| {
            user.write_int32(1, mode)?;
            user.write_bytes(2, &mapping(100_000))?;
            user.write_bytes(3, &mapping(200_000))
        });
        let namespaces = message(|namespaces| {
            namespaces.write_int32(1, mode)?;
            namespaces.write_int32(2, 1)?;
            namespaces.write_int32(3, 2)?;
            namespaces.write_string(4, "a target")?;
            namespaces.write_bytes(5, &user)
        });
        message(|security| {
            security.write_bytes(1, &namespaces)?;
            security.write_bool(4, true)?;
            security.write_bytes(5, &[1, 2, 3])?;
            security.write_bool(6, true)
        })
    }

    fn linux(mode: i32) -> Vec<u8> {
        let resources = message(|resources| {
            resources.write_int64(1, 100_000)?;
            resources.write_int64(2, -1)?;
            resources.write_int64(3, 2)?;
            resources.write_int64(4, 9_007_199_254_740_993)?;
            resources.write_int64(5, -998)
        });
        message(|linux| {
            linux.write_string(1, "/kubepods/pod1")?;
            linux.write_bytes(2, &security(mode))?;
            linux.write_bytes(3, &entry("net.core.somaxconn", "1024"))?;
            linux.write_bytes(4, b"")?;
            linux.write_bytes(5, &resources)
        })
    }

    fn config(mode: i32) -> Any {
        let metadata = message(|metadata| {
            metadata.write_string(1, "web")?;
            metadata.write_string(2, "u-1")?;
            metadata.write_string(3, "default")?;
            metadata.write_uint32(4, 2)
        });
        let dns = message(|dns| {
            dns.write_string(1, "10.0.0.10")?;
            dns.write_string(1, "1.1.1.1")?;
            dns.write_string(2, "svc.cluster.local")?;
            dns.write_string(3, "ndots:5")
        });
        let port = message(|port| {
            port.write_int32(1, 1)?;
            port.write_int32(2, 53)?;
            port.write_int32(3, 5353)?;
            port.write_string(4, "127.0.0.1")
        });
        let value = message(|config| {
            config.write_bytes(1, &metadata)?;
            config.write_string(2, "web")?;
            config.write_string(3, "/var/log/pods/x")?;
            config.write_bytes(4, &dns)?;
            config.write_bytes(5, &port)?;
            config.write_bytes(5, &message(|port| port.write_int32(2, 80)))?;
            config.write_bytes(6, &entry("app", "web"))?;
            config.write_bytes(6, &entry("empty", ""))?;
            config.write_bytes(7, &entry("note", "a \"quoted\" word"))?;
            config.write_bytes(8, &linux(mode))?;
            config.write_bytes(9, b"\x0a\x00")
        });
        Any {
            type_url: format!("types.example/{TYPE}"),
            value,
            ..Any::default()
        }
    }

    fn json(mode: i32) -> String {
        serde_json::to_string(&from_any(Some(&config(mode))).unwrap()).unwrap()
    }

    #[test]
    fn a_config_is_shown_with_the_names_of_crictl() {
        let expected = concat!(
            r#"{"metadata":{"name":"web","uid":"u-1","namespace":"default","attempt":2},"hostname":"web","log_directory":"/var/log/pods/x""#,
            r#","dns_config":{"servers":["10.0.0.10","1.1.1.1"],"searches":["svc.cluster.local"],"options":["ndots:5"]}"#,
            r#","port_mappings":[{"protocol":1,"container_port":53,"host_port":5353,"host_ip":"127.0.0.1"},{"container_port":80}]"#,
            r#","labels":{"app":"web","empty":""},"annotations":{"note":"a \"quoted\" word"}"#,
            r#","linux":{"cgroup_parent":"/kubepods/pod1","security_context":{"namespace_options":{"pid":1,"ipc":2,"userns_options":{"uids":[{"host_id":100000,"length":65536}],"gids":[{"host_id":200000,"length":65536}]}},"privileged":true}"#,
            r#","sysctls":{"net.core.somaxconn":"1024"}"#,
            r#","overhead":{},"resources":{"cpu_period":100000,"cpu_quota":-1,"cpu_shares":2,"memory_limit_in_bytes":9007199254740993}}}"#,
        );
        assert_eq!(json(0), expected);
    }

    #[test]
    fn a_mode_without_a_name_stays() {
        let json = json(-7);
        assert!(json.contains(r#""network":-7,"#), "{json}");
        assert!(json.contains(r#"{"mode":-7,"#), "{json}");
    }

    #[test]
    fn other_options_are_refused() {
        let other = Any {
            type_url: "runtime.v1.Other".into(),
            ..Any::default()
        };
        let broken = Any {
            value: b"\x0a\x7f".to_vec(),
            ..config(0)
        };
        for (any, named) in [
            (None, TYPE),
            (Some(&other), "runtime.v1.Other"),
            (Some(&broken), "decode"),
        ] {
            let error = from_any(any).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
            assert!(error.to_string().contains(named), "{error}");
        }
    }
}
