//! The names that Kubernetes has for a pod and a container, for the log.

use super::Spec;

const CONTAINER: &str = "io.kubernetes.cri.container-name";
const POD: [&str; 2] = [
    "io.kubernetes.cri.sandbox-namespace",
    "io.kubernetes.cri.sandbox-name",
];

impl Spec {
    /// The container's name; empty without Kubernetes.
    pub fn container_name(&self) -> &str {
        self.annotation(CONTAINER).unwrap_or_default()
    }

    /// The pod's name, as `NAMESPACE/NAME`; empty without Kubernetes.
    pub fn pod_name(&self) -> String {
        match POD.map(|key| self.annotation(key)) {
            [Some(namespace), Some(name)] => format!("{namespace}/{name}"),
            _ => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use super::*;

    #[test]
    fn names_are_those_of_kubernetes() {
        let spec = |annotations: serde_json::Value| {
            let text = serde_json::json!({ "annotations": annotations }).to_string();
            Spec::parse(text.into_bytes(), Path::new("config.json")).unwrap()
        };
        let of_pod = spec(serde_json::json!({
            "io.kubernetes.cri.container-name": "nginx",
            "io.kubernetes.cri.sandbox-namespace": "default",
            "io.kubernetes.cri.sandbox-name": "web",
        }));
        assert_eq!(of_pod.container_name(), "nginx");
        assert_eq!(of_pod.pod_name(), "default/web");
        let alone = spec(serde_json::json!({}));
        assert_eq!(
            (alone.container_name(), alone.pod_name()),
            ("", String::new())
        );
    }
}
