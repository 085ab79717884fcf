//! What the CRI plugin keeps with the records of its containers: the kubelet's request. Pure.
//!
//! The labels of a record usually name the pod. They come from the kubelet and may be missing
//! (crictl sets none). The plugin's extension to the record holds the kubelet's whole request,
//! and the specification has annotations of the plugin's, which no image can set.

use std::collections::{BTreeMap, HashMap};

use prost_types::Any;
use serde::Deserialize;

use super::probes;
use crate::model::{DeclaredProbe, Pod};

/// The label that the plugin sets on its containers.
const KIND: &str = "io.cri-containerd.kind";
/// What the names of the plugin's extensions begin with.
const PREFIXES: [&str; 2] = ["io.cri-containerd", "io.containerd.cri"];
/// Longer ones are not read.
const METADATA_LIMIT: usize = 4 << 20;
/// Longer than any name in Kubernetes.
const NAME_LIMIT: usize = 512;
/// The annotation in which a kubelet notes what it runs before it stops a container.
const BEFORE_STOP: &str = "io.kubernetes.container.preStopHandler";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Container,
    Sandbox,
}

/// The kubelet's request to the plugin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Request {
    /// `None` if the plugin did not make the container.
    kind: Option<Kind>,
    /// The names it gives, by label.
    names: Names,
    pub(super) before_stop: Option<DeclaredProbe>,
}

type Names = BTreeMap<&'static str, String>;

const NAMESPACE: &str = "io.kubernetes.pod.namespace";
const NAME: &str = "io.kubernetes.pod.name";
const UID: &str = "io.kubernetes.pod.uid";
const CONTAINER: &str = "io.kubernetes.container.name";

impl Request {
    /// Reads the plugin's extension to a record: that of a container or of a sandbox. If it
    /// cannot be read, only its kind is known.
    pub(super) fn of(extensions: &HashMap<String, Any>) -> Request {
        let extension = |kind: &str| {
            PREFIXES.iter().find_map(|prefix| extensions.get(&format!("{prefix}.{kind}.metadata")))
        };
        if let Some(sandbox) = extension("sandbox") {
            let names = Config::read(&sandbox.value).map(Config::names_of_sandbox);
            let (kind, names) = (Some(Kind::Sandbox), names.unwrap_or_default());
            return Request { kind, names, before_stop: None };
        }
        let Some(container) = extension("container") else { return Request::default() };
        let config = Config::read(&container.value);
        let before_stop = config.as_ref().and_then(Config::before_stop);
        let names = config.map(Config::names_of_container).unwrap_or_default();
        Request { kind: Some(Kind::Container), names, before_stop }
    }
}

/// What a container's configuration and a sandbox's have in common.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    metadata: Option<Metadata>,
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// A container has a name, a sandbox has all three.
#[derive(Default, Deserialize)]
struct Metadata {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    uid: Option<String>,
    #[serde(default)]
    namespace: Option<String>,
}

impl Config {
    fn read(json: &[u8]) -> Option<Config> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Versioned {
            metadata: Stored,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Stored {
            config: Config,
        }
        if json.len() > METADATA_LIMIT {
            return None;
        }
        let versioned: Versioned = serde_json::from_slice(json).ok()?;
        Some(versioned.metadata.config)
    }

    fn names_of_container(self) -> Names {
        let labels = self.labels.unwrap_or_default();
        let mut names = Names::new();
        for name in [NAMESPACE, NAME, UID, CONTAINER] {
            add(&mut names, name, labels.get(name));
        }
        add(&mut names, CONTAINER, self.metadata.unwrap_or_default().name.as_ref());
        names
    }

    fn names_of_sandbox(self) -> Names {
        let Metadata { name, uid, namespace } = self.metadata.unwrap_or_default();
        let mut names = Names::new();
        for (label, name) in [(NAMESPACE, namespace), (NAME, name), (UID, uid)] {
            add(&mut names, label, name.as_ref());
        }
        names
    }

    fn before_stop(&self) -> Option<DeclaredProbe> {
        probes::of_kubelet(self.annotations.as_ref()?.get(BEFORE_STOP)?)
    }
}

/// Adds a name, if it is valid and none is known yet.
fn add(names: &mut Names, label: &'static str, name: Option<&String>) {
    if let Some(name) = name.filter(|name| !name.is_empty() && name.len() <= NAME_LIMIT) {
        names.entry(label).or_insert_with(|| name.clone());
    }
}

/// Whether the plugin made this container. The labels of an image alone do not show that.
pub(super) fn made(labels: &BTreeMap<String, String>, request: &Request) -> bool {
    request.kind.is_some() || labels.contains_key(KIND)
}

/// Kubernetes' name for a container: by its labels, else by the kubelet's request, else by the
/// annotations of its specification.
pub(super) fn pod(
    labels: &BTreeMap<String, String>,
    request: &Request,
    annotations: &BTreeMap<String, String>,
) -> Option<Pod> {
    if !made(labels, request) {
        return None;
    }
    let mut names = Names::new();
    for (label, annotation) in [
        (NAMESPACE, "io.kubernetes.cri.sandbox-namespace"),
        (NAME, "io.kubernetes.cri.sandbox-name"),
        (UID, "io.kubernetes.cri.sandbox-uid"),
        (CONTAINER, "io.kubernetes.cri.container-name"),
    ] {
        add(&mut names, label, labels.get(label));
        add(&mut names, label, request.names.get(label));
        add(&mut names, label, annotations.get(annotation));
    }
    // A pod may have labels of any name. None of them turns its sandbox into a container.
    let is_sandbox = request.kind == Some(Kind::Sandbox)
        || labels.get(KIND).is_some_and(|kind| kind == "sandbox");
    if is_sandbox {
        names.remove(CONTAINER);
    }
    Some(Pod {
        namespace: names.remove(NAMESPACE)?,
        name: names.remove(NAME)?,
        uid: names.remove(UID).unwrap_or_default(),
        container: names.remove(CONTAINER),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ProbeSource;

    fn texts(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    fn request(name: &str, config: &serde_json::Value) -> Request {
        let json = serde_json::json!({
            "Version": "v1", "Metadata": { "ID": "c", "Name": "n", "Config": config },
        });
        of_value(name, json.to_string().as_bytes())
    }

    fn of_value(name: &str, value: &[u8]) -> Request {
        let type_url = "github.com/containerd/cri/pkg/store/container/Metadata".into();
        let any = Any { type_url, value: value.to_vec() };
        Request::of(&[(name.to_owned(), any)].into())
    }

    const CONTAINERS: &str = "io.cri-containerd.container.metadata";
    const SANDBOXES: &str = "io.cri-containerd.sandbox.metadata";

    fn web() -> Pod {
        Pod {
            namespace: "shop".into(),
            name: "web-1".into(),
            uid: "u".into(),
            container: Some("nginx".into()),
        }
    }

    fn kubelets_labels() -> BTreeMap<String, String> {
        texts(&[(NAME, "web-1"), (NAMESPACE, "shop"), (UID, "u"), (CONTAINER, "nginx")])
    }

    #[test]
    fn an_images_labels_make_no_pod() {
        let none = BTreeMap::new();
        let mut labels = kubelets_labels();
        assert_eq!(pod(&labels, &Request::default(), &none), None);
        labels.insert(KIND.into(), "container".into());
        assert_eq!(pod(&labels, &Request::default(), &none), Some(web()));
    }

    #[test]
    fn without_labels_the_kubelets_request_names_the_pod() {
        let none = BTreeMap::new();
        let config = serde_json::json!({
            "metadata": { "name": "nginx", "attempt": 1 },
            "labels": { NAME: "web-1", NAMESPACE: "shop", UID: "u" },
        });
        for name in [CONTAINERS, "io.containerd.cri.container.metadata"] {
            assert_eq!(pod(&none, &request(name, &config), &none), Some(web()), "{name}");
        }
        assert_eq!(pod(&none, &request("another.metadata", &config), &none), None);
        // The record's own labels come first, and are completed.
        let labels = texts(&[(NAME, "web-2")]);
        let expected = Pod { name: "web-2".into(), ..web() };
        assert_eq!(pod(&labels, &request(CONTAINERS, &config), &none), Some(expected));
    }

    #[test]
    fn without_either_the_plugins_annotations_do() {
        let annotations = texts(&[
            ("io.kubernetes.cri.sandbox-namespace", "shop"),
            ("io.kubernetes.cri.sandbox-name", "web-1"),
            ("io.kubernetes.cri.sandbox-uid", "u"),
            ("io.kubernetes.cri.container-name", "nginx"),
        ]);
        let none = BTreeMap::new();
        let found = request(CONTAINERS, &serde_json::json!({}));
        assert_eq!(pod(&none, &found, &annotations), Some(web()));
        assert_eq!(pod(&none, &Request::default(), &annotations), None, "not the plugin's");
        assert_eq!(pod(&none, &found, &none), None);
        assert_eq!(pod(&none, &of_value(CONTAINERS, b"{"), &annotations), Some(web()));
    }

    #[test]
    fn what_containerd_writes_is_read() {
        // As containerd 1.6.20 has stored a pod that was requested without labels.
        let container = of_value(
            CONTAINERS,
            br#"{"Version":"v1","Metadata":{"ID":"df32","Name":"app_web_shop_u_0",
                "SandboxID":"80fa","Config":{"metadata":{"name":"app"},"image":{"image":"web:1"},
                "command":["/bin/busybox","sleep","600"],"annotations":{
                "io.kubernetes.container.preStopHandler":
                "{\"exec\":{\"command\":[\"/bin/sh\",\"-c\",\"sleep 20\"]}}"},
                "linux":{"security_context":{"namespace_options":{"network":2,"pid":1}}}},
                "ImageRef":"sha256:5083","LogPath":"","StopSignal":"","ProcessLabel":""}}"#,
        );
        let expected = Request {
            kind: Some(Kind::Container),
            names: [(CONTAINER, "app".to_owned())].into(),
            before_stop: probes::of_kubelet(r#"{"exec":{"command":["/bin/sh","-c","sleep 20"]}}"#),
        };
        assert!(expected.before_stop.is_some());
        assert_eq!(container, expected);
        let sandbox = of_value(
            SANDBOXES,
            br#"{"Version":"v1","Metadata":{"ID":"80fa","Name":"web_shop_u_0","Config":{
                "metadata":{"name":"web","uid":"u","namespace":"shop"},
                "linux":{"cgroup_parent":"/kubepods"}},"NetNSPath":"","IP":"",
                "AdditionalIPs":null,"RuntimeHandler":"","CNIResult":null,"ProcessLabel":""}}"#,
        );
        let names = [(NAMESPACE, "shop"), (NAME, "web"), (UID, "u")];
        let names = names.map(|(label, name)| (label, name.to_owned())).into();
        let expected = Request { kind: Some(Kind::Sandbox), names, before_stop: None };
        assert_eq!(sandbox, expected);
    }

    #[test]
    fn a_sandbox_is_a_pod_without_a_container() {
        let none = BTreeMap::new();
        let config = serde_json::json!({
            "metadata": { "name": "web-1", "uid": "u", "namespace": "shop" },
            "labels": { CONTAINER: "nginx" },
            "annotations": { BEFORE_STOP: r#"{"exec":{"command":["/bin/sh"]}}"# },
        });
        let found = request(SANDBOXES, &config);
        assert_eq!(found.before_stop, None, "a pod's annotation is no hook");
        let expected = Pod { container: None, ..web() };
        assert_eq!(pod(&none, &found, &none), Some(expected.clone()));
        assert_eq!(pod(&texts(&[(CONTAINER, "nginx")]), &found, &none), Some(expected.clone()));
        let mut labels = kubelets_labels();
        labels.insert(KIND.into(), "sandbox".into());
        assert_eq!(pod(&labels, &Request::default(), &none), Some(expected));
    }

    #[test]
    fn what_a_kubelet_runs_before_a_stop_is_declared() {
        let config = serde_json::json!({
            "annotations": { BEFORE_STOP: r#"{"exec":{"command":["/quit","now"]}}"# },
        });
        let argv = vec!["/quit".to_owned(), "now".to_owned()];
        let expected = DeclaredProbe { argv, source: ProbeSource::LifecycleHook };
        assert_eq!(request(CONTAINERS, &config).before_stop, Some(expected));
        let config = serde_json::json!({ "annotations": { BEFORE_STOP: "?" } });
        assert_eq!(request(CONTAINERS, &config).before_stop, None);
        assert_eq!(request(CONTAINERS, &serde_json::json!({})).before_stop, None);
    }

    #[test]
    fn an_empty_or_long_name_is_passed_over() {
        let none = BTreeMap::new();
        let long = "x".repeat(NAME_LIMIT + 1);
        let labels = texts(&[(KIND, "container"), (NAME, ""), (NAMESPACE, &long)]);
        assert_eq!(pod(&labels, &Request::default(), &none), None);
        let config = serde_json::json!({ "labels": kubelets_labels() });
        assert_eq!(pod(&labels, &request(CONTAINERS, &config), &none), Some(web()));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>) {
            let none = BTreeMap::new();
            for name in [CONTAINERS, SANDBOXES] {
                assert!(made(&none, &of_value(name, &bytes)));
            }
        }
    }
}
