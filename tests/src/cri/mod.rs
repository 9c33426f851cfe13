//! Pods and containers through CRI, as kubelet makes them.

mod container;
mod pod;

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use k8s_cri::v1 as api;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

pub use self::container::{Container, ContainerSpec, Executed};
pub use self::pod::{Pod, PodSpec};
use crate::until::{eventually, ok_if};

/// The longest time for any call. CRI's own limit for a container's start is minutes.
const DEADLINE: Duration = Duration::from_secs(100);

/// The error of a failed call.
#[derive(Clone, Debug)]
pub struct Failure(pub String);

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The client, with plain blocking calls.
pub struct Cri {
    runtime: Rc<Runtime>,
    channel: Channel,
    configs: RefCell<HashMap<String, api::PodSandboxConfig>>,
}

/// Calls one method of the runtime service by name.
macro_rules! call {
    ($cri:expr, $method:ident, $request:expr) => {{
        let cri = $cri;
        let mut client =
            k8s_cri::v1::runtime_service_client::RuntimeServiceClient::new(cri.channel.clone());
        let request = $request;
        cri.wait(
            stringify!($method),
            async move { client.$method(request).await },
        )
    }};
}

use call;

impl Cri {
    /// A client of the containerd that listens, now or later, at this address.
    pub fn new(address: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let channel = {
            let _inside = runtime.enter();
            Endpoint::from_shared(format!("unix://{address}"))
                .unwrap()
                .connect_lazy()
        };
        Self {
            runtime: Rc::new(runtime),
            channel,
            configs: RefCell::default(),
        }
    }

    fn wait<T>(
        &self,
        what: &str,
        call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T, Failure> {
        self.runtime.block_on(async {
            match tokio::time::timeout(DEADLINE, call).await {
                Ok(Ok(response)) => Ok(response.into_inner()),
                Ok(Err(status)) => Err(Failure(format!(
                    "{what}: {:?}: {}",
                    status.code(),
                    status.message()
                ))),
                Err(_) => panic!("{what}: no answer within {DEADLINE:?}"),
            }
        })
    }

    /// `UpdateContainerResources` of any container.
    ///
    /// # Errors
    /// CRI's error, or a lost connection.
    pub fn try_update(
        &self,
        container: &str,
        resources: api::LinuxContainerResources,
    ) -> Result<(), Failure> {
        let request = api::UpdateContainerResourcesRequest {
            container_id: container.to_owned(),
            linux: Some(resources),
            ..Default::default()
        };
        call!(self, update_container_resources, request).map(|_| ())
    }

    /// `StartContainer` of any container.
    ///
    /// # Errors
    /// CRI's error, or a lost connection.
    pub fn try_start(&self, container: &str) -> Result<(), Failure> {
        let request = api::StartContainerRequest {
            container_id: container.to_owned(),
        };
        call!(self, start_container, request).map(drop)
    }

    /// `Ok` when containerd answers and its network is ready.
    pub fn ready(&self) -> Result<(), String> {
        let status = call!(self, status, api::StatusRequest { verbose: false })
            .map_err(|failure| failure.0)?;
        let not_ready: Vec<_> = status
            .status
            .unwrap_or_default()
            .conditions
            .into_iter()
            // Other conditions are advice: containerd 2.2 and later warn of cgroup v1.
            .filter(|condition| ["RuntimeReady", "NetworkReady"].contains(&&*condition.r#type))
            .filter(|condition| !condition.status)
            .collect();
        ok_if(not_ready.is_empty(), || format!("{not_ready:?}"))
    }

    /// Whether a runtime handler offers user namespaces, as CRI tells kubelet.
    #[track_caller]
    pub fn offers_user_namespaces(&self, handler: &str) -> bool {
        self.features(handler).user_namespaces
    }

    /// The features of a runtime handler, as CRI tells kubelet; none where CRI knows of none.
    #[track_caller]
    pub fn features(&self, handler: &str) -> api::RuntimeHandlerFeatures {
        let status = call!(self, status, api::StatusRequest { verbose: false })
            .unwrap_or_else(|failure| panic!("{failure}"));
        let mut handlers = status.runtime_handlers.into_iter();
        handlers
            .find(|one| one.name == handler)
            .and_then(|one| one.features)
            .unwrap_or_default()
    }

    /// Whether CRI knows the image.
    pub fn has_image(&self, name: &str) -> bool {
        let mut client = ImageServiceClient::new(self.channel.clone());
        let image = api::ImageSpec {
            image: name.to_owned(),
            ..Default::default()
        };
        let request = api::ImageStatusRequest {
            image: Some(image),
            verbose: false,
        };
        self.wait(
            "image_status",
            async move { client.image_status(request).await },
        )
        .is_ok_and(|response| response.image.is_some())
    }

    /// The ids of all pods.
    pub fn pods(&self) -> Vec<String> {
        let response = call!(
            self,
            list_pod_sandbox,
            api::ListPodSandboxRequest::default()
        );
        response
            .map(|response| response.items.into_iter().map(|pod| pod.id).collect())
            .unwrap_or_default()
    }

    /// Stops and removes every pod. Each call is repeated, as kubelet does, while containerd still works on an exit.
    #[track_caller]
    pub fn remove_all_pods(&self) {
        for id in self.pods() {
            // kubelet repeats the call, too: a shim may just be ending.
            eventually(Duration::from_secs(15), || {
                self.stop_pod(&id).map_err(|failure| failure.to_string())
            });
            eventually(Duration::from_secs(15), || {
                self.remove_pod(&id).map_err(|failure| failure.to_string())
            });
        }
    }

    fn stop_pod(&self, id: &str) -> Result<(), Failure> {
        call!(
            self,
            stop_pod_sandbox,
            api::StopPodSandboxRequest {
                pod_sandbox_id: id.to_owned()
            }
        )
        .map(drop)
    }

    fn remove_pod(&self, id: &str) -> Result<(), Failure> {
        call!(
            self,
            remove_pod_sandbox,
            api::RemovePodSandboxRequest {
                pod_sandbox_id: id.to_owned()
            }
        )
        .map(drop)
    }
}

/// The JSON document in a verbose status.
fn verbose(info: &HashMap<String, String>) -> serde_json::Value {
    let parsed = |key| {
        let entry = info
            .get(key)
            .map(|text| serde_json::from_str(text).unwrap());
        entry.unwrap_or_default()
    };
    let mut shown: serde_json::Value = parsed("info");
    if info.contains_key("pause") {
        shown["pause"] = parsed("pause");
    }
    shown
}

/// The pid in a document of [`verbose`].
#[track_caller]
fn pid(info: &serde_json::Value) -> i32 {
    info["pid"]
        .as_i64()
        .and_then(|pid| i32::try_from(pid).ok())
        .unwrap_or_else(|| panic!("no pid in {info}"))
}
