//! Kubernetes' side of containerd: as much of the Container Runtime Interface
//! (`runtime.v1`) as the tests need, with the field numbers of its `api.proto`.

use std::collections::HashMap;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Endpoint;
use tungstenite::client::IntoClientRequest as _;
use tungstenite::http::{HeaderValue, header};
use tungstenite::{Message, WebSocket};

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ImageSpec {
    #[prost(string, tag = "1")]
    pub(crate) image: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PullImageResponse {
    #[prost(string, tag = "1")]
    image_ref: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PodSandboxMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
}

/// Which namespaces a pod uses: 0 its own, 2 the node's, 3 those of another container.
#[derive(Clone, PartialEq, prost::Message)]
struct NamespaceOption {
    #[prost(int32, tag = "1")]
    network: i32,
    #[prost(int32, tag = "2")]
    pid: i32,
    #[prost(string, tag = "4")]
    target_id: String,
}

const CONTAINER: i32 = 1;
const NODE: i32 = 2;
const TARGET: i32 = 3;

#[derive(Clone, PartialEq, prost::Message)]
struct LinuxSandboxSecurityContext {
    #[prost(message, optional, tag = "1")]
    namespace_options: Option<NamespaceOption>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LinuxPodSandboxConfig {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    security_context: Option<LinuxSandboxSecurityContext>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct PodSandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodSandboxMetadata>,
    #[prost(map = "string, string", tag = "6")]
    labels: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPodSandboxConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RunPodSandboxRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<PodSandboxConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RunPodSandboxResponse {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
}

/// To stop a sandbox, and to remove it.
#[derive(Clone, PartialEq, prost::Message)]
struct PodSandboxRequest {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Mount {
    #[prost(string, tag = "1")]
    container_path: String,
    #[prost(string, tag = "2")]
    host_path: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LinuxContainerSecurityContext {
    #[prost(message, optional, tag = "3")]
    namespace_options: Option<NamespaceOption>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LinuxContainerConfig {
    #[prost(message, optional, tag = "2")]
    security_context: Option<LinuxContainerSecurityContext>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
    #[prost(message, repeated, tag = "7")]
    mounts: Vec<Mount>,
    #[prost(map = "string, string", tag = "9")]
    labels: HashMap<String, String>,
    #[prost(bool, tag = "12")]
    stdin: bool,
    #[prost(bool, tag = "14")]
    tty: bool,
    #[prost(message, optional, tag = "15")]
    linux: Option<LinuxContainerConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ExecSyncRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, repeated, tag = "2")]
    cmd: Vec<String>,
    #[prost(int64, tag = "3")]
    timeout: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ExecSyncResponse {
    #[prost(bytes = "vec", tag = "1")]
    stdout: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    stderr: Vec<u8>,
    #[prost(int32, tag = "3")]
    exit_code: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AttachRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(bool, tag = "2")]
    stdin: bool,
    #[prost(bool, tag = "3")]
    tty: bool,
    #[prost(bool, tag = "4")]
    stdout: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AttachResponse {
    #[prost(string, tag = "1")]
    url: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CreateContainerRequest {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    sandbox_config: Option<PodSandboxConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CreateContainerResponse {
    #[prost(string, tag = "1")]
    container_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StartContainerRequest {
    #[prost(string, tag = "1")]
    container_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Empty {}

/// A pod on the host's network, which needs no plugins, below `cgroup_parent`.
pub(crate) fn pod(name: &str, cgroup_parent: &str) -> PodSandboxConfig {
    let [pod_name, pod_namespace, pod_uid] = pod_labels(name);
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: pod_name.1.clone(),
            uid: pod_uid.1.clone(),
            namespace: pod_namespace.1.clone(),
        }),
        labels: HashMap::from([pod_name, pod_namespace, pod_uid]),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: cgroup_parent.to_owned(),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(NamespaceOption {
                    network: NODE,
                    pid: CONTAINER,
                    target_id: String::new(),
                }),
            }),
        }),
    }
}

/// The labels with which a kubelet names a pod.
fn pod_labels(name: &str) -> [(String, String); 3] {
    [("name", name), ("namespace", "shop"), ("uid", name)]
        .map(|(key, value)| (format!("io.kubernetes.pod.{key}"), value.to_owned()))
}

/// The container `app` of the pod `name`, with directories of the host in it.
pub(crate) fn container(
    name: &str,
    image: &str,
    command: &[&str],
    mounts: &[(&PathBuf, &str)],
) -> ContainerConfig {
    let mut labels = HashMap::from(pod_labels(name));
    labels.insert("io.kubernetes.container.name".to_owned(), "app".to_owned());
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: "app".to_owned() }),
        image: Some(ImageSpec { image: image.to_owned() }),
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        mounts: mounts
            .iter()
            .map(|(host_path, container_path)| Mount {
                container_path: (*container_path).to_owned(),
                host_path: host_path.display().to_string(),
            })
            .collect(),
        labels,
        stdin: false,
        tty: false,
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(NamespaceOption {
                    network: NODE,
                    pid: CONTAINER,
                    target_id: String::new(),
                }),
            }),
        }),
    }
}

/// As with `stdin: true` and `tty: true` in a pod's specification.
pub(crate) fn with_terminal(container: ContainerConfig) -> ContainerConfig {
    ContainerConfig { stdin: true, tty: true, ..container }
}

/// As by `kubectl debug -it --target`: a shell with a terminal in the pid namespace of the
/// container `target`.
pub(crate) fn beside(target: &str, container: ContainerConfig) -> ContainerConfig {
    let options = NamespaceOption { network: NODE, pid: TARGET, target_id: target.to_owned() };
    let mut labels = container.labels.clone();
    labels.insert("io.kubernetes.container.name".to_owned(), "debugger".to_owned());
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: "debugger".to_owned() }),
        labels,
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(options),
            }),
        }),
        ..with_terminal(container)
    }
}

/// A client of containerd, as a kubelet is.
pub(crate) struct Cri {
    socket: PathBuf,
}

/// How long a call may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

impl Cri {
    pub(crate) fn new(socket: PathBuf) -> Cri {
        Cri { socket }
    }

    /// Pulls an image and returns its ID: `sha256:` and the digest of its config.
    pub(crate) fn pull(&self, image: &str) -> anyhow::Result<String> {
        let request = PullImageRequest { image: Some(ImageSpec { image: image.to_owned() }) };
        let response: PullImageResponse = self.call("ImageService/PullImage", request)?;
        Ok(response.image_ref)
    }

    pub(crate) fn run_pod_sandbox(&self, pod: &PodSandboxConfig) -> anyhow::Result<String> {
        let request = RunPodSandboxRequest { config: Some(pod.clone()) };
        let response: RunPodSandboxResponse = self.call("RuntimeService/RunPodSandbox", request)?;
        Ok(response.pod_sandbox_id)
    }

    /// Ends a pod with all its containers.
    pub(crate) fn remove_pod_sandbox(&self, pod_sandbox_id: &str) -> anyhow::Result<()> {
        for method in ["RuntimeService/StopPodSandbox", "RuntimeService/RemovePodSandbox"] {
            let request = PodSandboxRequest { pod_sandbox_id: pod_sandbox_id.to_owned() };
            let _: Empty = self.call(method, request)?;
        }
        Ok(())
    }

    pub(crate) fn create_container(
        &self,
        pod_sandbox_id: &str,
        container: &ContainerConfig,
        pod: &PodSandboxConfig,
    ) -> anyhow::Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod_sandbox_id.to_owned(),
            config: Some(container.clone()),
            sandbox_config: Some(pod.clone()),
        };
        let response: CreateContainerResponse =
            self.call("RuntimeService/CreateContainer", request)?;
        Ok(response.container_id)
    }

    pub(crate) fn start_container(&self, container_id: &str) -> anyhow::Result<()> {
        let request = StartContainerRequest { container_id: container_id.to_owned() };
        self.call("RuntimeService/StartContainer", request).map(|_: Empty| ())
    }

    /// Runs a command in a container, as a kubelet does for a probe: its exit code,
    /// and what it printed.
    pub(crate) fn exec_sync(
        &self,
        container_id: &str,
        command: &[&str],
    ) -> anyhow::Result<(i32, Vec<u8>)> {
        let request = ExecSyncRequest {
            container_id: container_id.to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout: 30,
        };
        let response: ExecSyncResponse = self.call("RuntimeService/ExecSync", request)?;
        Ok((response.exit_code, response.stdout))
    }

    /// Attaches to the terminal of a container's init, as `kubectl attach -it` does.
    pub(crate) fn attach(&self, container_id: &str) -> anyhow::Result<Attached> {
        let request = AttachRequest {
            container_id: container_id.to_owned(),
            stdin: true,
            tty: true,
            stdout: true,
        };
        let response: AttachResponse = self.call("RuntimeService/Attach", request)?;
        let address = response.url.strip_prefix("http://").context("no plain connection")?;
        let mut request = format!("ws://{address}").into_client_request()?;
        let protocol = HeaderValue::from_static("v4.channel.k8s.io");
        request.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, protocol);
        let (host, _) = address.split_once('/').context("no path")?;
        let (socket, _) = tungstenite::client(request, TcpStream::connect(host)?)?;
        Ok(Attached(socket))
    }

    fn call<Request, Response>(&self, method: &str, request: Request) -> anyhow::Result<Response>
    where
        Request: prost::Message + Send + Sync + 'static,
        Response: prost::Message + Default + Send + Sync + 'static,
    {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let conversation = async {
            let mut client = tonic::client::Grpc::new(connect(&self.socket).await?);
            client.ready().await?;
            let path = PathAndQuery::try_from(format!("/runtime.v1.{method}"))?;
            let codec = tonic_prost::ProstCodec::<Request, Response>::default();
            let response = client.unary(tonic::Request::new(request), path, codec).await?;
            Ok::<_, anyhow::Error>(response.into_inner())
        };
        runtime
            .block_on(async { tokio::time::timeout(PATIENCE, conversation).await })
            .with_context(|| format!("{method} was not answered in {PATIENCE:?}"))?
            .with_context(|| format!("{method} failed"))
    }
}

/// A connection to a container's terminal.
pub(crate) struct Attached(WebSocket<TcpStream>);

impl Attached {
    pub(crate) fn types(&mut self, text: &str) -> anyhow::Result<()> {
        // The first byte names the stream: 0 is the input.
        let frame = [b"\0", text.as_bytes()].concat();
        Ok(self.0.send(Message::binary(frame))?)
    }
}

async fn connect(socket: &Path) -> anyhow::Result<tonic::transport::Channel> {
    Ok(Endpoint::try_from(format!("unix:{}", socket.display()))?.connect().await?)
}
