//! The fields of a container's OCI runtime specification that driftd needs, and the kind of
//! its runtime. Pure.
//!
//! The text comes from the container's record. A field that cannot be read is left out.

use std::collections::BTreeMap;
use std::path::PathBuf;

use prost::Message as _;
use serde::Deserialize;

use crate::model::{EntryPoint, IdMap, IdRange, printable};

/// Where a program without a path is searched if the environment has no PATH.
const USUAL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How many arguments and directories of an entry point are kept, and the longest.
const MAX_TEXTS: usize = 65;
const MAX_TEXT: usize = 1024;

/// The few fields that are read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Spec {
    /// Where the rootfs is mounted, if that is an absolute path.
    pub(super) root: Option<PathBuf>,
    pub(super) id_map: Option<IdMap>,
    pub(super) entry_point: EntryPoint,
    /// The annotations of the CRI plugin.
    pub(super) annotations: BTreeMap<String, String>,
    /// Where its control group is to be: a path, or `SLICE:PREFIX:NAME` for systemd.
    pub(super) cgroups_path: Option<String>,
}

impl Spec {
    /// Reads a specification. One that cannot be read counts as an empty one.
    pub(super) fn parse(json: &[u8]) -> Spec {
        #[derive(Deserialize)]
        struct Document {
            #[serde(default)]
            root: Option<Root>,
            #[serde(default)]
            linux: Option<Linux>,
            #[serde(default)]
            process: Option<Process>,
            #[serde(default)]
            annotations: Option<BTreeMap<String, String>>,
        }
        #[derive(Deserialize)]
        struct Process {
            #[serde(default)]
            args: Option<Vec<String>>,
            #[serde(default)]
            env: Option<Vec<String>>,
            #[serde(default)]
            cwd: String,
        }
        #[derive(Deserialize)]
        struct Root {
            #[serde(default)]
            path: PathBuf,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Linux {
            #[serde(default)]
            cgroups_path: Option<String>,
            #[serde(default)]
            uid_mappings: Option<Vec<Mapping>>,
            #[serde(default)]
            gid_mappings: Option<Vec<Mapping>>,
        }
        #[derive(Deserialize)]
        struct Mapping {
            #[serde(rename = "containerID")]
            container: u32,
            #[serde(rename = "hostID")]
            host: u32,
            size: u32,
        }
        let Ok(document) = serde_json::from_slice::<Document>(json) else { return Spec::default() };
        let ranges = |mappings: Option<Vec<Mapping>>| -> Vec<IdRange> {
            let range =
                |Mapping { container, host, size }| IdRange { container, host, count: size };
            mappings.unwrap_or_default().into_iter().map(range).collect()
        };
        let mut linux = document.linux;
        let cgroups_path = linux.as_mut().and_then(|linux| linux.cgroups_path.take());
        let id_map = linux.and_then(|linux| {
            let map = IdMap { uids: ranges(linux.uid_mappings), gids: ranges(linux.gid_mappings) };
            (!map.uids.is_empty() || !map.gids.is_empty()).then_some(map)
        });
        let root = document.root.map(|root| root.path).filter(|path| path.is_absolute());
        let entry_point = document.process.map(|process| {
            let environment = process.env.unwrap_or_default();
            let path = environment.iter().find_map(|variable| variable.strip_prefix("PATH="));
            let is_short = |text: &str| text.len() <= MAX_TEXT;
            let search = path.unwrap_or(USUAL_PATH).split(':').filter(|one| is_short(one));
            let mut arguments = process.args.unwrap_or_default();
            arguments.truncate(MAX_TEXTS);
            // Too long for a path: replaced by an option, which is no path either.
            let long = arguments.iter_mut().filter(|one| !is_short(one));
            long.for_each(|one| "-".clone_into(one));
            EntryPoint {
                arguments,
                search: search.take(MAX_TEXTS).map(str::to_owned).collect(),
                directory: Some(process.cwd).filter(|one| is_short(one)).unwrap_or_default(),
            }
        });
        let mut annotations = document.annotations.unwrap_or_default();
        annotations.retain(|name, _| name.starts_with("io.kubernetes.cri."));
        let entry_point = entry_point.unwrap_or_default();
        Spec { root, id_map, entry_point, annotations, cgroups_path }
    }

    /// The length of the path of the container's own control group within `path`, the group of
    /// its init. `None` if `path` is not below it: then the own group is not known.
    pub(super) fn own_cgroup(&self, id: &str, path: &[u8]) -> Option<usize> {
        let requested = self.cgroups_path.as_deref().unwrap_or_default();
        let mut of_systemd = requested.split(':');
        let scope = match (of_systemd.next(), of_systemd.next(), of_systemd.next()) {
            (_, Some(_), Some(name)) if name.ends_with(".slice") => Some(name.to_owned()),
            (_, Some(prefix), Some(name)) => Some(format!("{prefix}-{name}.scope")),
            _ => None,
        };
        let own = scope.as_deref().unwrap_or(if requested.is_empty() { id } else { requested });
        let own: Vec<&[u8]> =
            own.as_bytes().split(|&byte| byte == b'/').filter(|name| !name.is_empty()).collect();
        if own.is_empty() || own.iter().any(|name| [&b"."[..], b".."].contains(name)) {
            return None;
        }
        // The outermost match: below it, the container may choose the names.
        let mut names: Vec<&[u8]> = Vec::new();
        let mut end = 0;
        for name in path.strip_prefix(b"/")?.split(|&byte| byte == b'/') {
            names.push(name);
            end += 1 + name.len();
            if names.ends_with(&own) {
                return Some(end);
            }
        }
        None
    }
}

/// Why driftd cannot see into containers of this runtime: their programs run on a kernel of
/// their own. `options` are those of runc's shim, which can be set to start another program in
/// runc's place.
pub(super) fn own_kernel(runtime: &str, options: &[u8]) -> Option<String> {
    #[derive(Clone, PartialEq, prost::Message)]
    struct Options {
        #[prost(string, tag = "6")]
        binary_name: String,
    }
    let binary = Options::decode(options).map(|options| options.binary_name).unwrap_or_default();
    let sandbox = [runtime, &binary].into_iter().find_map(|name| {
        // A name like io.containerd.kata-qemu.v2, or a path of a shim or a binary.
        let last = name.rsplit('/').next().unwrap_or(name);
        let has = |name: &str| last.split(['.', '-', '_']).any(|part| part == name);
        if has("runsc") || has("gvisor") {
            Some("gVisor")
        } else if has("kata") || last.starts_with("kata") {
            Some("Kata Containers")
        } else {
            None
        }
    })?;
    Some(format!(
        "its runtime {} ({sandbox}) runs its programs on a kernel of their own: this node's \
         fanotify does not see what they execute",
        printable(if runtime.is_empty() { binary.as_bytes() } else { runtime.as_bytes() })
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_namespaces_are_read() {
        let spec = Spec::parse(
            br#"{"root":{"path":"/d/overlay2/m/merged"},"linux":{
                "uidMappings":[{"containerID":0,"hostID":100000,"size":65536}],
                "gidMappings":[{"containerID":0,"hostID":200000,"size":65536}]}}"#,
        );
        let range = |host| IdRange { container: 0, host, count: 65_536 };
        assert_eq!(
            spec,
            Spec {
                root: Some("/d/overlay2/m/merged".into()),
                id_map: Some(IdMap { uids: vec![range(100_000)], gids: vec![range(200_000)] }),
                ..Spec::default()
            }
        );
    }

    #[test]
    fn d03_a_containers_own_control_group_is_the_one_that_was_asked_for() {
        let own = |asked: &str, path: &str| {
            let json = serde_json::json!({ "linux": { "cgroupsPath": asked } }).to_string();
            let spec = Spec::parse(json.as_bytes());
            spec.own_cgroup("web", path.as_bytes()).map(|end| path[..end].to_owned())
        };
        for (asked, path, expected) in [
            ("/default/web", "/default/web", Some("/default/web")),
            ("/default/web", "/default/web/init.scope", Some("/default/web")),
            // The container makes groups below its own, and chooses their names.
            ("/default/web", "/default/web/default/web", Some("/default/web")),
            // A namespace and a container of one name.
            ("/web/web", "/web/web/x", Some("/web/web")),
            ("/web/web", "/web/x", None),
            // A node within a container.
            ("/default/web", "/docker/4711/default/web", Some("/docker/4711/default/web")),
            (
                "kube.slice:cri:web",
                "/kube.slice/cri-web.scope/a",
                Some("/kube.slice/cri-web.scope"),
            ),
            ("kube.slice::one.slice", "/kube.slice/one.slice", Some("/kube.slice/one.slice")),
            ("kube.slice:cri:web", "/kube.slice/cri-other.scope", None),
            ("", "/web", Some("/web")),
            ("/default/web", "/default/webs", None),
            ("/default/web", "/default", None),
            ("/default/web", "/", None),
            ("/default/web", "/../default/web", Some("/../default/web")),
            ("/..", "/a/..", None),
            ("/", "/a", None),
            ("::", "/-.scope", Some("/-.scope")),
        ] {
            assert_eq!(own(asked, path).as_deref(), expected, "{asked} in {path}");
        }
        assert_eq!(Spec::default().own_cgroup("web", b"/x/web"), Some(6));
    }

    #[test]
    fn the_entry_point_is_read() {
        let spec = Spec::parse(
            br#"{"process":{"args":["run","/etc/app"],"env":["A=1","PATH=/a:/b"],"cwd":"/srv"}}"#,
        );
        let expected = EntryPoint {
            arguments: vec!["run".into(), "/etc/app".into()],
            search: vec!["/a".into(), "/b".into()],
            directory: "/srv".into(),
        };
        assert_eq!(spec.entry_point, expected);
        let spec = Spec::parse(br#"{"process":{"args":null,"env":null}}"#);
        assert_eq!(spec.entry_point.arguments, [""; 0]);
        assert_eq!(spec.entry_point.search.len(), 6);
    }

    #[test]
    fn the_cri_plugins_annotations_are_kept() {
        let spec =
            Spec::parse(br#"{"annotations":{"io.kubernetes.cri.sandbox-name":"web","a":"b"}}"#);
        let name = "io.kubernetes.cri.sandbox-name".to_owned();
        assert_eq!(spec.annotations, [(name, "web".to_owned())].into());
        assert_eq!(Spec::parse(br#"{"annotations":null}"#), Spec::default());
    }

    #[test]
    fn a_specification_without_these_fields_counts_as_empty() {
        for json in ["{}", r#"{"root":{"path":"rootfs"},"linux":{}}"#, "[", "null"] {
            assert_eq!(Spec::parse(json.as_bytes()), Spec::default(), "{json}");
        }
    }

    #[test]
    fn runtimes_with_a_kernel_of_their_own_are_known_by_name() {
        let check = |runtime: &str, binary: &str, expected: Option<&str>| {
            // Field 6, a string.
            let mut options = Vec::new();
            if !binary.is_empty() {
                options.extend([0x32, u8::try_from(binary.len()).unwrap()]);
                options.extend(binary.bytes());
            }
            let reason = own_kernel(runtime, &options);
            assert_eq!(reason.is_some(), expected.is_some(), "{runtime} {binary}: {reason:?}");
            if let (Some(reason), Some(expected)) = (reason, expected) {
                assert!(reason.contains(expected), "{reason}");
            }
        };
        check("io.containerd.runc.v2", "", None);
        check("io.containerd.runc.v2", "/usr/sbin/runc", None);
        check("io.containerd.runc.v2", "/usr/local/bin/runsc", Some("(gVisor)"));
        check("io.containerd.runsc.v1", "", Some("io.containerd.runsc.v1 (gVisor)"));
        check("io.containerd.kata.v2", "", Some("Kata Containers"));
        check("io.containerd.kata-qemu.v2", "", Some("Kata Containers"));
        check("/opt/kata/bin/containerd-shim-kata-v2", "", Some("Kata Containers"));
        check("io.containerd.crun.v2", "crun", None);
        assert_eq!(own_kernel("io.containerd.runc.v2", b"\xff\xff"), None);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_readers_panic(bytes: Vec<u8>, name: String) {
            let spec = Spec { cgroups_path: Some(name.clone()), ..Spec::default() };
            let _ = spec.own_cgroup(&name, &bytes);
            let _ = (Spec::parse(&bytes), own_kernel(&name, &bytes));
        }
    }
}
