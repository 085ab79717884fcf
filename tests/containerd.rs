//! The containerd room against a real containerd: each test starts a containerd in a
//! scratch directory and ends it. Needs root, containerd, runc, ctr and busybox-static;
//! without them the tests fail with a message that names what is missing.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt::Debug;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::{self as containerd_api, CreateContainerRequest};
use containerd_client::tonic::Request;
use containerd_client::with_namespace;
use crossbeam_channel::Receiver;
use driftd::baseline::{self, Blobs as _, ImageBaseline, ImageName, Proof, RecordRequest};
use driftd::config;
use driftd::containerd::{Containerd, ContentBlobs, Error, Recording, RuntimeEvent};
use driftd::health::{Failure, Health};
use driftd::model::{
    Blob, ChainId, Container, ContainerId, DeclaredProbe, DiffId, Exit, IdMap, IdRange,
    Incarnation, Layer, LayerId, ManifestDigest, Pod, ProbeSource,
};
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};

const PATIENCE: Duration = Duration::from_secs(30);

// --- a containerd for the test ---

struct Node {
    directory: tempfile::TempDir,
    containerd: Option<Child>,
}

impl Node {
    /// A node whose containerd is not started yet.
    fn new() -> Node {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests start containerd and containers: run them as root"
        );
        let directory = tempfile::Builder::new().prefix("driftd-node-").tempdir().unwrap();
        let node = Node { directory, containerd: None };
        let at = |name: &str| node.path(name).display().to_string();
        let settings = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = {:?}\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n",
            at("root"),
            at("state"),
            at("containerd.sock"),
            at("opt")
        );
        std::fs::write(node.path("config.toml"), settings).unwrap();
        node
    }

    fn started() -> Node {
        let mut node = Node::new();
        node.start();
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("containerd.sock")
    }

    fn start(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("containerd.log"))
            .unwrap();
        let child = Command::new("containerd")
            .arg("-c")
            .arg(self.path("config.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("containerd cannot be started (apt-get install containerd runc)");
        self.containerd = Some(child);
        wait_for("containerd is ready", || {
            self.ctr_output(&["version"]).map_err(|text| text + &self.log())
        });
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("containerd.log")).unwrap_or_default()
    }

    /// `kill -9`.
    fn crash(&mut self) {
        let mut child = self.containerd.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn ctr_output(&self, arguments: &[&str]) -> Result<String, String> {
        let output = Command::new("ctr")
            .arg("--address")
            .arg(self.socket())
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("ctr cannot be run (apt-get install containerd)");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            Err(format!("ctr {arguments:?}: {}", text(&output.stderr)))
        }
    }

    #[track_caller]
    fn ctr(&self, arguments: &[&str]) -> String {
        self.ctr_output(arguments).unwrap_or_else(|text| panic!("{text}{}", self.log()))
    }

    #[track_caller]
    fn import(&self, image: &TestImage) {
        self.import_with(image, &[]);
    }

    #[track_caller]
    fn import_with(&self, image: &TestImage, arguments: &[&str]) {
        let archive = self.path("image.tar");
        image.write(&archive);
        let archive = archive.to_str().unwrap().to_owned();
        let mut all = vec!["images", "import"];
        all.extend(arguments);
        all.push(&archive);
        self.ctr(&all);
    }

    /// Starts a container that sleeps.
    #[track_caller]
    fn run(&self, image: &TestImage, id: &str) {
        self.run_with(image, id, &[]);
    }

    #[track_caller]
    fn run_with(&self, image: &TestImage, id: &str, arguments: &[&str]) {
        let mut all = vec!["run", "--detach", "--null-io"];
        all.extend(arguments);
        all.extend([image.name.as_str(), id, "/bin/busybox", "sleep", "600"]);
        self.ctr(&all);
    }

    /// The first word of each line; nothing if the command fails.
    fn lines(&self, arguments: &[&str]) -> Vec<String> {
        self.ctr_output(arguments)
            .unwrap_or_default()
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.containerd.is_none() && self.path("root").exists() {
            // A test failed while containerd was down: its shims must still go.
            self.start();
        }
        if self.containerd.is_some() {
            for namespace in self.lines(&["namespaces", "list", "--quiet"]) {
                let within = |words: &[&str]| {
                    let mut all = vec!["--namespace", namespace.as_str()];
                    all.extend(words);
                    self.lines(&all)
                };
                for task in within(&["tasks", "list", "--quiet"]) {
                    within(&["tasks", "resume", &task]);
                    within(&["tasks", "delete", "--force", &task]);
                }
                for container in within(&["containers", "list", "--quiet"]) {
                    within(&["containers", "delete", &container]);
                }
            }
        }
        if let Some(mut child) = self.containerd.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        // Mounts that a failed test left behind.
        let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let root = self.directory.path().to_str().unwrap();
        for mount_point in mountinfo.lines().rev().filter_map(|line| line.split(' ').nth(4)) {
            if mount_point.starts_with(root) {
                let _ = Command::new("umount").arg("--lazy").arg(mount_point).status();
            }
        }
    }
}

#[track_caller]
fn wait_for<T, E: Debug>(what: &str, mut check: impl FnMut() -> Result<T, E>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match check() {
            Ok(value) => return value,
            Err(state) if Instant::now() > deadline => panic!("not in time: {what}; {state:?}"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

// --- images ---

struct TestImage {
    name: String,
    layers: Vec<Vec<u8>>,
    /// Whether the manifest is wrapped in an index, beside another platform and a provenance.
    index: bool,
    /// The run settings in its config.
    settings: serde_json::Value,
}

impl TestImage {
    /// The first layer has busybox; each layer has files of its own.
    fn new(name: &str, layers: &[&[(&str, &str)]]) -> TestImage {
        let busybox = std::fs::read("/bin/busybox")
            .expect("there is no /bin/busybox (apt-get install busybox-static)");
        let layers = layers
            .iter()
            .enumerate()
            .map(|(number, files)| {
                let mut tar = tar::Builder::new(Vec::new());
                if number == 0 {
                    append(&mut tar, "bin/busybox", 0o755, &busybox);
                }
                for (path, content) in *files {
                    append(&mut tar, path, 0o644, content.as_bytes());
                }
                tar.into_inner().unwrap()
            })
            .collect();
        let name = format!("docker.io/test/{name}:1");
        TestImage { name, layers, index: false, settings: serde_json::json!({}) }
    }

    fn diff_ids(&self) -> Vec<DiffId> {
        self.layers.iter().map(|layer| DiffId(Sha256::digest(layer).into())).collect()
    }

    /// The layers are not compressed: each is its own archive.
    fn archives(&self) -> Vec<Option<String>> {
        self.diff_ids().iter().map(|diff_id| Some(diff_id.to_string())).collect()
    }

    fn chain(&self) -> Vec<ChainId> {
        ChainId::of_layers(&self.diff_ids())
    }

    fn layer_ids(&self) -> Vec<LayerId> {
        self.diff_ids().into_iter().map(LayerId::Diff).collect()
    }

    /// Config and manifest.
    fn documents(&self) -> (Vec<u8>, Vec<u8>) {
        let config = serde_json::json!({
            "architecture": architecture(), "os": "linux", "config": self.settings,
            "rootfs": {"type": "layers", "diff_ids": self.diff_ids()},
        });
        let config = serde_json::to_vec(&config).unwrap();
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|layer| descriptor("application/vnd.oci.image.layer.v1.tar", layer))
            .collect();
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": layers,
        });
        (config, serde_json::to_vec(&manifest).unwrap())
    }

    fn manifest_digest(&self) -> ManifestDigest {
        ManifestDigest(Sha256::digest(self.documents().1).into())
    }

    /// An OCI layout, as `ctr images import` reads it.
    fn write(&self, archive: &Path) {
        let (config, manifest) = self.documents();
        let mut blobs = self.layers.clone();
        let mut top = descriptor(MANIFEST, &manifest);
        if self.index {
            let entry = |os: &str, architecture: &str, mut entry: serde_json::Value| {
                entry["platform"] = serde_json::json!({"os": os, "architecture": architecture});
                entry
            };
            let index = serde_json::json!({
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.index.v1+json",
                "manifests": [
                    entry("unknown", "unknown", descriptor(MANIFEST, b"provenance")),
                    entry("linux", "s390x", descriptor(MANIFEST, b"not pulled")),
                    entry("linux", architecture(), top),
                ],
            });
            let index = serde_json::to_vec(&index).unwrap();
            top = descriptor("application/vnd.oci.image.index.v1+json", &index);
            blobs.push(index);
        }
        blobs.extend([config, manifest]);
        top["annotations"] = serde_json::json!({"io.containerd.image.name": self.name});
        let layout = serde_json::json!({"schemaVersion": 2, "manifests": [top]});

        let mut tar = tar::Builder::new(std::fs::File::create(archive).unwrap());
        append(&mut tar, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#);
        append(&mut tar, "index.json", 0o644, &serde_json::to_vec(&layout).unwrap());
        for blob in blobs {
            let path = format!("blobs/sha256/{}", DiffId(Sha256::digest(&blob).into()).hex());
            append(&mut tar, &path, 0o644, &blob);
        }
        tar.into_inner().unwrap();
    }
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn append(tar: &mut tar::Builder<impl std::io::Write>, path: &str, mode: u32, content: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_size(content.len() as u64);
    tar.append_data(&mut header, path, content).unwrap();
}

fn descriptor(media_type: &str, blob: &[u8]) -> serde_json::Value {
    serde_json::json!({
        "mediaType": media_type,
        "digest": DiffId(Sha256::digest(blob).into()),
        "size": blob.len(),
    })
}

// --- driftd's side ---

/// A recording job: its image, and the files in its directories while it ran.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Submitted {
    namespace: String,
    name: String,
    manifest_digest: Option<ManifestDigest>,
    layers: Vec<LayerId>,
    chain: Vec<ChainId>,
    files: Vec<BTreeSet<String>>,
    /// The digests of their archives.
    archives: Vec<Option<String>>,
}

/// A recorder that records no baseline, and keeps the jobs for the test.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Recorded>>);

#[derive(Default)]
struct Recorded {
    known: HashSet<LayerId>,
    jobs: Vec<Submitted>,
    proofs: Vec<Proof>,
    newest: Vec<Layer>,
    forgets: bool,
    /// All image names in the last report.
    listed: Vec<String>,
    removed: Vec<String>,
}

impl Recording for Recorder {
    fn submit(&self, job: RecordRequest) {
        let image = job.image.clone();
        let layers: Vec<LayerId> = job.layers.iter().map(|layer| layer.id).collect();
        let chain: Vec<ChainId> = job.layers.iter().map(|layer| layer.chain_id).collect();
        let baseline = ImageBaseline::new(*chain.last().unwrap(), Vec::new());
        let submitted = Submitted {
            namespace: image.as_ref().map(|image| image.namespace.clone()).unwrap_or_default(),
            name: image.as_ref().map(|image| image.name.clone()).unwrap_or_default(),
            manifest_digest: image.and_then(|image| image.manifest_digest),
            layers,
            chain,
            files: job
                .layers
                .iter()
                .filter_map(|layer| layer.directory.as_deref())
                .map(files_below)
                .collect(),
            archives: job
                .layers
                .iter()
                .map(|layer| layer.blob.as_ref().map(|blob| blob.digest.clone()))
                .collect(),
        };
        let mut recorded = self.0.lock().unwrap();
        if !recorded.forgets {
            recorded.known.extend(&submitted.layers);
        }
        recorded.jobs.push(submitted);
        recorded.proofs.push(job.proof);
        recorded.newest = job.layers;
        drop(recorded);
        job.done.unwrap()(Ok(baseline::Recorded {
            baseline: Arc::new(baseline),
            layers: Vec::new(),
        }));
    }

    fn unrecorded(&self, layers: &[LayerId]) -> Vec<LayerId> {
        let recorded = self.0.lock().unwrap();
        layers.iter().filter(|layer| !recorded.known.contains(layer)).copied().collect()
    }

    fn image_names(&self, _endpoint: &str, listed: Vec<(ImageName, ChainId)>) {
        let mut names: Vec<String> = listed.into_iter().map(|(image, _)| image.name).collect();
        names.sort();
        self.0.lock().unwrap().listed = names;
    }

    fn image_removed(&self, _namespace: &str, name: &str) {
        self.0.lock().unwrap().removed.push(name.into());
    }
}

fn files_below(root: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else {
                found.insert(path.strip_prefix(root).unwrap().display().to_string());
            }
        }
    }
    found
}

struct Driftd {
    runtime: tokio::runtime::Runtime,
    containerd: Containerd,
    changes: Receiver<RuntimeEvent>,
    /// Everything received so far.
    seen: Vec<RuntimeEvent>,
    recorder: Recorder,
    health: Arc<Health>,
}

impl Driftd {
    fn start(node: &Node) -> Driftd {
        Driftd::start_without(node, &[])
    }

    fn start_without(node: &Node, excluded: &[&str]) -> Driftd {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let settings = config::Containerd {
            docker_socket: "/nonexistent".into(),
            sockets: vec![node.socket()],
            exclude_namespaces: excluded.iter().map(|&name| name.to_owned()).collect(),
        };
        let (sender, changes) = crossbeam_channel::bounded(8);
        let (recorder, health) = (Recorder::default(), Arc::new(Health::default()));
        let containerd = {
            let _within = runtime.enter();
            Containerd::start(&settings, &sender, recorder.clone(), &health)
        };
        Driftd { runtime, containerd, changes, seen: Vec::new(), recorder, health }
    }

    /// Receives until `wanted` picks something.
    #[track_caller]
    fn until<T>(&mut self, what: &str, mut wanted: impl FnMut(&RuntimeEvent) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let Ok(change) = self.changes.recv_deadline(deadline) else {
                panic!("not in time: {what}; seen: {:#?}", self.seen);
            };
            let picked = wanted(&change);
            self.seen.push(change);
            if let Some(picked) = picked {
                return picked;
            }
        }
    }

    #[track_caller]
    fn until_seen(&mut self, expected: &RuntimeEvent) {
        self.until(&format!("{expected:?}"), |change| (change == expected).then_some(()));
    }

    #[track_caller]
    fn until_listed(&mut self) -> Vec<ContainerId> {
        self.until("the list is complete", |change| match change {
            RuntimeEvent::Listed { containers, .. } => Some(containers.clone()),
            _ => None,
        })
    }

    /// Collects the events of execs until `count` execs have ended.
    #[track_caller]
    fn until_execs_ended(&mut self, count: usize) -> Vec<RuntimeEvent> {
        let mut events = Vec::new();
        let mut ended = 0;
        self.until("the execs have ended", |change| {
            if let RuntimeEvent::ExecStarted { .. } | RuntimeEvent::ExecExited { .. } = change {
                events.push(change.clone());
            }
            ended += usize::from(matches!(change, RuntimeEvent::ExecExited { .. }));
            (ended == count).then_some(())
        });
        events
    }

    #[track_caller]
    fn until_disconnected(&mut self) -> String {
        self.until("the loss is reported", |change| match change {
            RuntimeEvent::Disconnected { reason, .. } => Some(reason.clone()),
            _ => None,
        })
    }

    #[track_caller]
    fn until_container(
        &mut self,
        id: &str,
        mut wanted: impl FnMut(&Container) -> bool,
    ) -> Container {
        self.until(&format!("the record of {id}"), |change| match change {
            RuntimeEvent::Container(container) if &*container.id.id == id && wanted(container) => {
                Some((**container).clone())
            }
            _ => None,
        })
    }

    #[track_caller]
    fn until_paused(&mut self, id: &str) -> Container {
        self.until_container(id, |container| {
            container.task.as_ref().is_some_and(|task| task.paused)
        })
    }

    /// The newest record received so far.
    #[track_caller]
    fn record(&self, id: &str) -> Container {
        let newest = self.seen.iter().rev().find_map(|change| match change {
            RuntimeEvent::Container(container) if &*container.id.id == id => {
                Some((**container).clone())
            }
            _ => None,
        });
        newest.unwrap_or_else(|| panic!("no record of {id}: {:#?}", self.seen))
    }

    /// The newest run in the records received so far.
    #[track_caller]
    fn incarnation(&self, id: &str) -> Option<Incarnation> {
        let Container { task, created_at, .. } = self.record(id);
        let created_at = Some(created_at.expect("containerd reports when a record was created"));
        task.map(|task| Incarnation { pid: task.pid, start_time: task.start_time, created_at })
    }

    /// Waits until `count` jobs were submitted.
    #[track_caller]
    fn jobs(&self, count: usize) -> Vec<Submitted> {
        wait_for("images are recorded", || {
            let jobs = self.recorder.0.lock().unwrap().jobs.clone();
            if jobs.len() >= count { Ok(jobs) } else { Err(jobs) }
        })
    }

    /// Waits until `expected` are the reasons why images have no baseline.
    #[track_caller]
    fn until_problems(&self, expected: &[&str]) {
        wait_for("the images' problems are reported", || {
            let problems = self.containerd.image_problems();
            let reasons: Vec<&str> =
                problems.iter().map(|problem| problem.reason.as_str()).collect();
            if reasons == expected { Ok(()) } else { Err(problems) }
        });
    }

    fn record_image(&self, name: &str) -> Result<ChainId, Error> {
        self.prove_image(name, Proof::Later)
    }

    fn prove_image(&self, name: &str, proof: Proof) -> Result<ChainId, Error> {
        let recorded = self.containerd.record_image(name, proof, Arc::default());
        self.runtime.block_on(recorded).map(|recorded| recorded.baseline.chain_id())
    }

    /// A driftd whose recorder never counts a layer as recorded.
    fn start_knowing_nothing(node: &Node) -> Driftd {
        let driftd = Driftd::start(node);
        driftd.recorder.0.lock().unwrap().forgets = true;
        driftd
    }

    #[track_caller]
    fn last_job_of(&self, name: &str) -> Submitted {
        let recorded = self.recorder.0.lock().unwrap();
        let job = recorded.jobs.iter().rev().find(|job| job.name == name);
        job.unwrap_or_else(|| panic!("no job for {name}: {:#?}", recorded.jobs)).clone()
    }

    fn last_job(&self) -> (Submitted, Proof) {
        let recorded = self.recorder.0.lock().unwrap();
        (recorded.jobs.last().unwrap().clone(), *recorded.proofs.last().unwrap())
    }

    /// Reads an archive through the content store.
    fn read(&self, blob: &Blob) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        let blobs = ContentBlobs::new(self.runtime.handle().clone());
        blobs.open(blob)?.read_to_end(&mut bytes).map_err(|err| err.to_string())?;
        Ok(bytes)
    }
}

fn layer_ids(container: &Container) -> Vec<LayerId> {
    container.layers.iter().map(|layer| layer.id).collect()
}

fn files(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

/// Container IDs are cgroup names on the whole machine.
fn unique(name: &str) -> String {
    format!("driftd-test-{name}-{}", std::process::id())
}

fn default(id: &str) -> ContainerId {
    ContainerId::new("default", id)
}

/// A containerd, and a driftd that has listed its containers.
fn connected() -> (Node, Driftd) {
    let node = Node::started();
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    (node, driftd)
}

// --- the tests ---

#[test]
fn an_imported_image_is_recorded_layer_by_layer_and_leaves_nothing_behind() {
    let (node, driftd) = connected();

    let mut image = TestImage::new("three", &[&[("a", "1")], &[("etc/b", "2")], &[("c", "3")]]);
    image.index = true;
    node.import(&image);
    let expected = Submitted {
        namespace: "default".into(),
        name: image.name.clone(),
        manifest_digest: Some(image.manifest_digest()),
        layers: image.layer_ids(),
        chain: image.chain(),
        files: vec![files(&["a", "bin/busybox"]), files(&["etc/b"]), files(&["c"])],
        archives: image.archives(),
    };
    assert_eq!(driftd.jobs(1), [expected]);

    // A single layer: containerd gives a bind, not an overlay.
    let single = TestImage::new("single", &[&[("only", "1")]]);
    node.import(&single);
    let jobs = driftd.jobs(2);
    assert_eq!(jobs[1].layers, single.layer_ids());
    assert_eq!(jobs[1].files, [files(&["bin/busybox", "only"])]);

    wait_for("views and leases are removed", || {
        let mut left = node.lines(&["snapshots", "list"]);
        left.extend(node.lines(&["leases", "list", "--quiet"]));
        left.retain(|name| name.contains("driftd"));
        if left.is_empty() { Ok(()) } else { Err(left) }
    });

    // Deleting the image removes only the name.
    node.ctr(&["images", "remove", &single.name]);
    wait_for("the name is forgotten", || {
        let removed = driftd.recorder.0.lock().unwrap().removed.clone();
        if removed.contains(&single.name) { Ok(()) } else { Err(removed) }
    });
    driftd.until_problems(&[]);
    assert_eq!(driftd.health.losses(), []);
}

#[test]
fn a_containers_life_is_reported_and_it_can_be_paused_and_killed() {
    let node = Node::started();
    let image = TestImage::new("life", &[&[("a", "1")], &[("b", "2")]]);
    node.import(&image);
    let mut driftd = Driftd::start(&node);
    assert_eq!(driftd.until_listed(), []);

    let id = unique("life");
    node.run(&image, &id);
    let (pid, rootfs) = driftd.until("the task's creation", |change| match change {
        RuntimeEvent::TaskCreated { container, pid, rootfs } if *container == default(&id) => {
            Some((*pid, rootfs.clone()))
        }
        _ => None,
    });
    let rootfs = rootfs.expect("containerd's event names the overlay");
    let container = driftd.until_container(&id, |container| container.task.is_some());
    assert_eq!(container.task.as_ref().map(|task| (task.pid, task.paused)), Some((pid, false)));
    assert_eq!(container.rootfs, Some(rootfs.clone()));
    assert_eq!(layer_ids(&container), image.layer_ids());
    let directories: Vec<PathBuf> =
        container.layers.iter().rev().filter_map(|layer| layer.directory.clone()).collect();
    assert_eq!(directories, rootfs.lowerdirs);
    assert!(directories[1].join("a").exists(), "{container:?}");
    assert!(directories[0].join("b").exists(), "{container:?}");
    assert_eq!(container.image.name.as_deref(), Some(image.name.as_str()));
    assert_eq!(container.image.manifest_digest, Some(image.manifest_digest()));
    assert_eq!(container.image.chain_id, image.chain().last().copied());
    assert_eq!(container.runtime, "io.containerd.runc.v2");
    assert_eq!(container.snapshotter, "overlayfs");
    assert_eq!(container.no_baseline, None);
    assert_eq!(container.pod, None);

    let container = default(&id);
    let containerd = driftd.containerd.clone();
    let meant = driftd.incarnation(&id);
    assert_eq!(meant.map(|meant| meant.pid), Some(pid));
    let respond = |driftd: &Driftd, what: &str| {
        driftd.runtime.block_on(async {
            match what {
                "pause" => containerd.pause(&container, meant).await.map(|done| done.message),
                "resume" => containerd.resume(&container, meant).await,
                "kill" => containerd.kill(&container, meant, false).await.map(|done| done.message),
                other => panic!("{other}"),
            }
        })
    };
    assert_eq!(respond(&driftd, "resume").unwrap(), "it was not paused");
    assert_eq!(respond(&driftd, "pause").unwrap(), format!("paused (pid {pid})"));
    driftd.until_paused(&id);
    assert_eq!(respond(&driftd, "pause").unwrap(), "it was paused already");
    assert_eq!(respond(&driftd, "resume").unwrap(), format!("resumed (pid {pid})"));
    driftd
        .until_container(&id, |container| container.task.as_ref().is_some_and(|task| !task.paused));
    assert_eq!(respond(&driftd, "kill").unwrap(), format!("killed (pid {pid})"));
    driftd.until_seen(&RuntimeEvent::TaskExited { container: container.clone() });
    for what in ["kill", "pause", "resume"] {
        let err = respond(&driftd, what).unwrap_err();
        assert!(matches!(err, Error::Gone(_)), "{what}: {err:?}");
    }
    let known_to_run = driftd.runtime.block_on(containerd.kill(&container, None, false)).unwrap();
    assert_eq!(known_to_run.message, "it was not running: there was nothing to kill");
    let err = driftd.runtime.block_on(containerd.pause(&container, None)).unwrap_err();
    assert_eq!(err.to_string(), "it is not running: there is nothing to pause");

    node.ctr(&["tasks", "delete", &id]);
    node.ctr(&["containers", "delete", &id]);
    driftd.until_seen(&RuntimeEvent::Removed { container: container.clone() });
    let err = respond(&driftd, "kill").unwrap_err();
    assert!(matches!(err, Error::UnknownContainer(_)), "{err:?}");
    assert_eq!(driftd.health.losses(), []);
}

/// The pid, the exit and the end of an exec, from its two events.
#[track_caller]
fn exec_of(events: &[RuntimeEvent], name: &ContainerId, id: &str) -> (u32, Exit, Timestamp) {
    let [
        RuntimeEvent::ExecStarted { container, exec_id, pid },
        RuntimeEvent::ExecExited { container: ended, exec_id: ended_id, pid: ended_pid, exit, at },
    ] = events
    else {
        panic!("{events:#?}");
    };
    assert_eq!((container, exec_id.as_str()), (name, id));
    assert_eq!((ended, ended_id, ended_pid), (container, exec_id, pid));
    (*pid, *exit, *at)
}

#[test]
fn the_start_and_the_exit_of_an_exec_are_reported() {
    let node = Node::started();
    let image = TestImage::new("exec", &[&[("a", "1")]]);
    node.import(&image);
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    let id = unique("exec");
    node.run(&image, &id);
    let container = driftd.until_container(&id, |container| container.task.is_some());
    let init = container.task.unwrap().pid;
    let exec = |exec_id: &str, command: &[&str]| {
        let exec = ["tasks", "exec", "--exec-id", exec_id, &id];
        node.ctr_output(&[&exec[..], command].concat())
    };
    let shell = |script| ["/bin/busybox", "sh", "-c", script];

    let code = |code| Exit { code: Some(code), signal: None };
    let killed = Exit { code: None, signal: Some(9) };
    let mut pids = BTreeSet::from([init]);
    let begun = Timestamp::now();
    for (exec_id, script, expected) in
        [("fine", "exit 0", code(0)), ("bad", "exit 3", code(3)), ("dead", "kill -9 $$", killed)]
    {
        let _its_exit_status = exec(exec_id, &shell(script));
        let events = driftd.until_execs_ended(1);
        let (pid, exit, at) = exec_of(&events, &default(&id), exec_id);
        assert_eq!(exit, expected, "{script}");
        assert!(begun <= at && at <= Timestamp::now(), "{begun} {at}");
        assert!(pids.insert(pid), "{pid} of {pids:?}");
    }

    // An exec of a missing program does not start: no event of it comes before the next.
    exec("absent", &["/bin/absent"]).unwrap_err();
    exec("next", &shell("exit 0")).unwrap();
    let events = driftd.until_execs_ended(1);
    assert_eq!(exec_of(&events, &default(&id), "next").1, code(0));

    // The pid is the host's.
    std::thread::scope(|scope| {
        scope.spawn(|| exec("long", &["/bin/busybox", "sleep", "601"]));
        let started = driftd.until("the exec's beginning", |change| match change {
            RuntimeEvent::ExecStarted { exec_id, pid, .. } if exec_id == "long" => Some(*pid),
            _ => None,
        });
        let command_line = std::fs::read_to_string(format!("/proc/{started}/cmdline")).unwrap();
        assert_eq!(command_line, "/bin/busybox\0sleep\u{0}601\0");
        let pid = nix::unistd::Pid::from_raw(started.try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        let events = driftd.until_execs_ended(1);
        let [RuntimeEvent::ExecExited { exec_id, pid, exit, .. }] = events.as_slice() else {
            panic!("{events:#?}");
        };
        assert_eq!((exec_id.as_str(), *pid, *exit), ("long", started, killed));
    });

    // None of this produced another record of the container.
    let records: Vec<&RuntimeEvent> = driftd
        .seen
        .iter()
        .skip_while(|change| !matches!(change, RuntimeEvent::ExecStarted { .. }))
        .filter(|change| {
            !matches!(change, RuntimeEvent::ExecStarted { .. } | RuntimeEvent::ExecExited { .. })
        })
        .collect();
    assert_eq!(records, Vec::<&RuntimeEvent>::new());
    assert_eq!(driftd.health.losses(), []);
}

#[test]
fn x11_a_response_meant_for_an_earlier_run_touches_no_later_one() {
    let node = Node::started();
    let image = TestImage::new("later", &[&[]]);
    node.import(&image);
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    let id = unique("later");
    node.run(&image, &id);
    driftd.until_container(&id, |container| container.task.is_some());
    let earlier = driftd.incarnation(&id);
    let refused = |driftd: &Driftd, meant, containers: &str| {
        let (containerd, container) = (driftd.containerd.clone(), default(&id));
        for what in ["kill", "pause", "resume"] {
            let err = driftd
                .runtime
                .block_on(async {
                    match what {
                        "kill" => {
                            containerd.kill(&container, meant, false).await.map(|done| done.message)
                        }
                        "pause" => {
                            containerd.pause(&container, meant).await.map(|done| done.message)
                        }
                        _ => containerd.resume(&container, meant).await,
                    }
                })
                .unwrap_err();
            assert!(matches!(err, Error::Gone(_)), "{what} of {containers}: {err:?}");
        }
    };
    // The same container, started again.
    node.ctr(&["tasks", "kill", "--signal", "SIGKILL", &id]);
    driftd.until_seen(&RuntimeEvent::TaskExited { container: default(&id) });
    node.ctr(&["tasks", "delete", &id]);
    let fifo = node.path("fifo");
    node.ctr(&["tasks", "start", "-d", "--fifo-dir", fifo.to_str().unwrap(), &id]);
    let is_new = |container: &Container, earlier: Option<Incarnation>| {
        container.task.as_ref().is_some_and(|task| Some(task.pid) != earlier.map(|run| run.pid))
    };
    driftd.until_container(&id, |container| is_new(container, earlier));
    refused(&driftd, earlier, "a container that was started again");
    // The pid is right, but the process or the container is another one.
    let now = driftd.incarnation(&id).unwrap();
    let other = |change: &dyn Fn(&mut Incarnation)| {
        let mut other = now;
        change(&mut other);
        Some(other)
    };
    refused(&driftd, other(&|run| run.start_time = earlier.unwrap().start_time), "another process");
    refused(&driftd, other(&|run| run.created_at = Some(Timestamp::UNIX_EPOCH)), "another record");
    // A process that exists, but is not the container's init.
    refused(&driftd, other(&|run| (run.pid, run.start_time) = (std::process::id(), None)), "me");
    refused(&driftd, None, "a container of which no run was known");
    assert_eq!(driftd.incarnation(&id), Some(now));
    let paused = driftd.runtime.block_on(driftd.containerd.pause(&default(&id), Some(now)));
    let paused = paused.unwrap();
    let text = format!("paused (pid {})", now.pid);
    assert_eq!((paused.message, paused.changed), (text, true), "it was left alone");
    // A paused container can be killed too.
    let killed = driftd.runtime.block_on(driftd.containerd.kill(&default(&id), Some(now), false));
    assert_eq!(killed.unwrap().message, format!("killed (pid {})", now.pid));
}

#[test]
fn a_crash_of_containerd_loses_nothing() {
    let mut node = Node::started();
    let image = TestImage::new("crash", &[&[], &[("b", "2")]]);
    node.import(&image);
    let (stays, goes) = (unique("stays"), unique("goes"));
    node.run(&image, &stays);
    node.run(&image, &goes);
    let mut driftd = Driftd::start(&node);
    assert_eq!(driftd.until_listed(), [default(&goes), default(&stays)]);
    assert_eq!(driftd.recorder.0.lock().unwrap().listed, std::slice::from_ref(&image.name));
    let before = driftd.record(&stays);
    assert!(before.task.is_some(), "{before:?}");
    let victim = driftd.record(&goes).task.unwrap().pid;

    node.crash();
    let reason = driftd.until_disconnected();
    assert!(reason.starts_with("lost containerd at "), "{reason}");
    assert_eq!(driftd.health.count(Failure::ContainerdLost), 1);
    // While containerd is down, a container ends.
    let victim = nix::unistd::Pid::from_raw(i32::try_from(victim).unwrap());
    nix::sys::signal::kill(victim, nix::sys::signal::Signal::SIGKILL).unwrap();
    driftd.seen.clear();
    node.start();
    assert_eq!(driftd.until_listed(), [default(&goes), default(&stays)]);
    let position = |wanted: &dyn Fn(&RuntimeEvent) -> bool| driftd.seen.iter().position(wanted);
    let connected = position(&|change| matches!(change, RuntimeEvent::Connected { .. }));
    let again = position(
        &|change| matches!(change, RuntimeEvent::Container(record) if record.id == default(&stays)),
    );
    assert!(connected.is_some() && connected < again, "{:#?}", driftd.seen);
    assert_eq!(driftd.record(&stays), before);
    let exited = RuntimeEvent::TaskExited { container: default(&goes) };
    if !driftd.seen.contains(&exited) {
        driftd.until_seen(&exited);
    }

    // Events arrive again.
    let new = unique("new");
    node.run(&image, &new);
    driftd.until_container(&new, |container| container.task.is_some());
}

#[test]
fn driftd_waits_for_a_socket_that_appears_later() {
    let mut node = Node::new();
    let mut driftd = Driftd::start(&node);
    let reason = driftd.until_disconnected();
    assert!(reason.starts_with("cannot reach containerd at "), "{reason}");
    let err =
        driftd.runtime.block_on(driftd.containerd.kill(&default("c"), None, false)).unwrap_err();
    assert!(matches!(err, Error::NotConnected { .. }), "{err:?}");
    // After several attempts the loss was reported once.
    std::thread::sleep(Duration::from_millis(500));
    node.start();
    assert_eq!(driftd.until_listed(), []);
    let again =
        RuntimeEvent::Disconnected { endpoint: node.socket().to_str().unwrap().into(), reason };
    let reports = driftd.seen.iter().filter(|change| **change == again).count();
    assert_eq!(reports, 1, "{:?}", driftd.seen);
    assert_eq!(driftd.health.losses(), []);
}

#[test]
fn a_missing_blob_affects_no_other_image() {
    let node = Node::started();
    let broken = TestImage::new("broken", &[&[("a", "broken")]]);
    let whole = TestImage::new("whole", &[&[("a", "whole")]]);
    node.import(&broken);
    node.import(&whole);
    let config = DiffId(Sha256::digest(broken.documents().0).into()).to_string();
    node.ctr(&["content", "delete", &config]);

    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    assert_eq!(driftd.jobs(1)[0].layers, whole.layer_ids());
    driftd.until_problems(&[
        "its config is missing from containerd's content store (pull the image again)",
    ]);
    let problem = &driftd.containerd.image_problems()[0];
    assert_eq!((&problem.name, &problem.digest), (&broken.name, &config));
    assert_eq!(driftd.health.count(Failure::BaselineUnavailable), 1);

    // After a second import it is recorded.
    node.import(&broken);
    assert_eq!(driftd.jobs(2)[1].layers, broken.layer_ids());
    driftd.until_problems(&[]);
}

#[test]
fn a_container_whose_image_is_gone_keeps_its_layers() {
    let node = Node::started();
    let image = TestImage::new("gone", &[&[("a", "1")], &[("b", "2")]]);
    node.import(&image);
    let id = unique("gone");
    node.run(&image, &id);
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    node.ctr(&["images", "remove", "--sync", &image.name]);
    wait_for("the image is gone", || {
        let removed = driftd.recorder.0.lock().unwrap().removed.clone();
        if removed.contains(&image.name) { Ok(()) } else { Err(removed) }
    });
    // A driftd that saw the image remembers its diff IDs.
    node.ctr(&["tasks", "pause", &id]);
    let container = driftd.until_paused(&id);
    assert_eq!(layer_ids(&container), image.layer_ids());
    assert_eq!(container.image.manifest_digest, None);

    // Another driftd knows the bottom layer only, and names the rest by its chain ID.
    let mut later = Driftd::start(&node);
    later.until_listed();
    let listed = later.record(&id);
    assert_eq!(layer_ids(&listed), [image.layer_ids()[0], LayerId::Chain(image.chain()[1])]);
    assert_eq!(listed.rootfs, container.rootfs);
    assert_eq!(listed.no_baseline, None);
}

#[test]
fn leases_of_an_ended_driftd_are_removed() {
    // No process has a pid above the kernel's limit.
    const STALE: &str = "driftd-view-4194999-0-0";
    let node = Node::started();
    node.ctr(&["leases", "create", "--id", STALE]);
    node.ctr(&["leases", "create", "--id", "another-owners"]);
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    wait_for("only the other lease is left", || {
        let leases = node.lines(&["leases", "list", "--quiet"]);
        if leases == ["another-owners"] { Ok(()) } else { Err(leases) }
    });
}

#[test]
fn a_moved_tag_does_not_rename_a_running_container() {
    let node = Node::started();
    let old = TestImage::new("moving", &[&[("version", "1")]]);
    let new = TestImage::new("moving", &[&[("version", "2")]]);
    node.import(&old);
    let id = unique("moving");
    node.run(&old, &id);
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    assert_eq!(driftd.record(&id).image.manifest_digest, Some(old.manifest_digest()));
    driftd.jobs(1);
    node.import(&new);
    assert_eq!(driftd.jobs(2)[1].layers, new.layer_ids());
    node.ctr(&["tasks", "pause", &id]);
    let after = driftd.until_paused(&id);
    assert_eq!(after.image.manifest_digest, None);
    assert_eq!(after.image.chain_id, old.chain().last().copied());
    assert_eq!(layer_ids(&after), old.layer_ids());
}

#[test]
fn an_image_is_recorded_once_it_is_unpacked() {
    let (node, driftd) = connected();
    let image = TestImage::new("later", &[&[("a", "1")], &[("b", "2")]]);
    node.import_with(&image, &["--no-unpack"]);
    driftd.until_problems(&["it is not unpacked yet; it will be recorded when it is"]);
    assert_eq!(driftd.recorder.0.lock().unwrap().jobs, []);

    node.run(&image, &unique("later"));
    assert_eq!(driftd.jobs(1)[0].layers, image.layer_ids());
    assert_eq!(driftd.record_image(&image.name).unwrap(), image.chain()[1]);
    let err = driftd.record_image("no/such:1").unwrap_err();
    assert!(matches!(err, Error::UnknownImage { .. }), "{err:?}");
    driftd.until_problems(&[]);
    assert_eq!(driftd.health.losses(), []);
}

#[test]
fn later_namespaces_are_followed_and_excluded_ones_are_not() {
    let node = Node::started();
    let mut driftd = Driftd::start_without(&node, &["hidden"]);
    driftd.until_listed();
    let image = TestImage::new("namespaces", &[&[("a", "1")]]);
    let archive = node.path("namespaces.tar");
    image.write(&archive);
    let archive = archive.to_str().unwrap();
    let (hidden, id) = (unique("hidden"), unique("other"));
    for (namespace, id) in [("hidden", &hidden), ("other", &id)] {
        let name = image.name.as_str();
        node.ctr(&["--namespace", namespace, "images", "import", archive]);
        let mut run = vec!["--namespace", namespace, "run", "--detach", "--null-io"];
        run.extend([name, id, "/bin/busybox", "sleep", "600"]);
        node.ctr(&run);
    }
    let container = driftd.until_container(&id, |container| container.task.is_some());
    assert_eq!(&*container.id.namespace, "other");
    let namespaces: Vec<String> =
        driftd.jobs(1).into_iter().map(|submitted| submitted.namespace).collect();
    assert_eq!(namespaces, ["other"]);
    for (namespace, id) in [("hidden", &hidden), ("other", &id)] {
        let exec = ["--namespace", namespace, "tasks", "exec", "--exec-id", "e", id];
        node.ctr(&[&exec[..], &["/bin/busybox", "true"]].concat());
    }
    exec_of(&driftd.until_execs_ended(1), &container.id, "e");
    let of_hidden: Vec<&RuntimeEvent> = driftd
        .seen
        .iter()
        .filter(|change| format!("{change:?}").contains(hidden.as_str()))
        .collect();
    assert_eq!(of_hidden, Vec::<&RuntimeEvent>::new());
}

#[test]
fn an_image_not_unpacked_is_recorded_from_its_archives_on_request() {
    let (node, driftd) = connected();
    let image = TestImage::new("archives", &[&[("a", "1")], &[("b", "2")]]);
    node.import_with(&image, &["--no-unpack"]);
    assert_eq!(driftd.prove_image(&image.name, Proof::Blobs).unwrap(), image.chain()[1]);
    let (job, proof) = driftd.last_job();
    assert_eq!((&job.layers, &job.archives), (&image.layer_ids(), &image.archives()));
    assert_eq!((job.files, proof), (vec![], Proof::Blobs), "there is no directory");
    let blobs: Vec<Blob> = {
        let newest = &driftd.recorder.0.lock().unwrap().newest;
        newest.iter().filter_map(|layer| layer.blob.clone()).collect()
    };
    assert_eq!(blobs.len(), 2);
    for (blob, layer) in blobs.iter().zip(&image.layers) {
        assert!(driftd.read(blob).as_ref() == Ok(layer), "{blob:?}");
    }
    assert_eq!(driftd.health.losses(), []);
}

#[test]
fn an_image_whose_pull_was_cancelled_is_reported_with_what_is_missing() {
    let node = Node::started();
    let image = TestImage::new("cancelled", &[&[("a", "1")], &[("b", "2")]]);
    node.import_with(&image, &["--no-unpack"]);
    node.ctr(&["content", "delete", &image.archives()[1].clone().unwrap()]);
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    driftd.until_problems(&["it is not unpacked yet; it will be recorded when it is"]);
    let err = driftd.record_image(&image.name).unwrap_err();
    assert_eq!(
        err.to_string(),
        format!(
            "the image `{}` cannot be read: it is not unpacked, and layer {} has no archive: it is \
             not in containerd's content store (discard_unpacked_layers removes it after the \
             unpack, and lazy snapshotters never fetch it) (pull it again, or start a container \
             of it)",
            image.name,
            image.diff_ids()[1]
        )
    );
    driftd.until_problems(&[&format!(
        "it is not unpacked, and layer {} has no archive: it is not in containerd's content store \
         (discard_unpacked_layers removes it after the unpack, and lazy snapshotters never fetch \
         it)",
        image.diff_ids()[1]
    )]);
    assert_eq!(driftd.recorder.0.lock().unwrap().jobs, []);
}

#[test]
fn a_proof_uses_the_directories_of_recorded_layers() {
    let node = Node::started();
    let image = TestImage::new("proof", &[&[("a", "1")], &[("b", "2")]]);
    node.import(&image);
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    driftd.jobs(1);
    let directories = vec![files(&["a", "bin/busybox"]), files(&["b"])];
    for (proof, expected) in
        [(Proof::Later, vec![]), (Proof::Blobs, directories.clone()), (Proof::Deep, directories)]
    {
        driftd.prove_image(&image.name, proof).unwrap();
        let (job, given) = driftd.last_job();
        assert_eq!((given, job.files), (proof, expected));
        assert_eq!(job.archives, image.archives());
    }
    // A digest names the image too, even after it has lost its name.
    let names = [image.manifest_digest().to_string(), image.chain()[1].to_string()];
    for name in names {
        assert_eq!(driftd.record_image(&name).unwrap(), image.chain()[1], "{name}");
    }
}

#[test]
fn an_image_without_a_name_is_recorded_from_its_container() {
    let node = Node::started();
    let image = TestImage::new("nameless", &[&[("a", "1")], &[("b", "2")]]);
    node.import(&image);
    let id = unique("nameless");
    node.run(&image, &id);
    node.ctr(&["images", "remove", "--sync", &image.name]);
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    let top = image.chain()[1];
    for name in [image.name.clone(), top.to_string()] {
        assert_eq!(driftd.prove_image(&name, Proof::Deep).unwrap(), top, "{name}");
        let (job, _) = driftd.last_job();
        assert_eq!(job.files, [files(&["a", "bin/busybox"]), files(&["b"])]);
        assert_eq!(job.layers, [image.layer_ids()[0], LayerId::Chain(top)]);
    }
}

#[test]
fn a_layer_without_an_archive_keeps_its_directory() {
    let node = Node::started();
    let image = TestImage::new("discarded", &[&[("a", "1")], &[("b", "2")]]);
    node.import(&image);
    // As discard_unpacked_layers does.
    for archive in image.archives().into_iter().flatten() {
        node.ctr(&["content", "delete", &archive]);
    }
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    assert_eq!(driftd.jobs(1)[0].files, [files(&["a", "bin/busybox"]), files(&["b"])]);
    // containerd removes the file itself at its next garbage collection.
    let blob = driftd.recorder.0.lock().unwrap().newest[0].blob.clone().unwrap();
    let reason = driftd.read(&Blob { size: 1, ..blob }).map(|bytes| bytes.len()).unwrap_err();
    assert!(reason.starts_with("it is not in containerd's content store"), "{reason}");
    driftd.until_problems(&[]);
}

#[test]
fn an_archive_is_read_from_containerds_file_or_streamed() {
    let mut node = Node::started();
    // Longer than several messages, and not a multiple of their size.
    let content = "0123456789abcdef".repeat(300_000);
    let image = TestImage::new("streamed", &[&[("large", &content)]]);
    node.import(&image);
    let driftd = Driftd::start(&node);
    let archive = image.archives()[0].clone().unwrap();
    let blob = |size| Blob {
        endpoint: node.socket().to_str().unwrap().into(),
        namespace: "default".into(),
        digest: archive.clone(),
        media_type: "application/vnd.oci.image.layer.v1.tar".into(),
        size,
    };
    let right = blob(image.layers[0].len() as u64);
    assert!(driftd.read(&right).unwrap() == image.layers[0], "read from the file");
    // A wrong size in the manifest does not change what is read.
    assert!(driftd.read(&blob(1)).unwrap() == image.layers[0], "streamed");
    let foreign = Blob { namespace: "other".into(), size: 1, ..right.clone() };
    let reason = driftd.read(&foreign).map(|bytes| bytes.len()).unwrap_err();
    assert!(reason.starts_with("it is not in containerd's content store"), "{reason}");

    // One reader survives a restart of containerd.
    let blobs = ContentBlobs::new(driftd.runtime.handle().clone());
    let read = |blob: &Blob| {
        let mut bytes = Vec::new();
        blobs.open(blob).unwrap().read_to_end(&mut bytes).unwrap();
        bytes.len()
    };
    let streamed = blob(1);
    assert_eq!(read(&streamed), image.layers[0].len());
    node.crash();
    node.start();
    assert_eq!(read(&streamed), image.layers[0].len());
    // A reader may stop early without waiting for the rest.
    let mut part = vec![0; 1000];
    blobs.open(&streamed).unwrap().read_exact(&mut part).unwrap();
    assert_eq!(part, image.layers[0][..1000]);
}

#[test]
fn the_same_layers_in_two_namespaces_are_two_directories_and_one_layer() {
    let node = Node::started();
    let image = TestImage::new("twice", &[&[("a", "1")], &[("b", "2")]]);
    let archive = node.path("twice.tar");
    image.write(&archive);
    let archive = archive.to_str().unwrap();
    let (one, other) = (unique("twice-one"), unique("twice-other"));
    for (namespace, id) in [("one", &one), ("other", &other)] {
        node.ctr(&["--namespace", namespace, "images", "import", archive]);
        let mut run = vec!["--namespace", namespace, "run", "--detach", "--null-io"];
        run.extend([image.name.as_str(), id, "/bin/busybox", "sleep", "600"]);
        node.ctr(&run);
    }
    let second_name = "docker.io/test/twice:again";
    node.ctr(&["--namespace", "one", "images", "tag", &image.name, second_name]);
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    let (one, other) = (driftd.record(&one), driftd.record(&other));
    assert_eq!(layer_ids(&one), image.layer_ids());
    assert_eq!(layer_ids(&other), image.layer_ids());
    for (layer, twin) in one.layers.iter().zip(&other.layers) {
        assert_ne!(layer.directory, twin.directory);
        let namespace = |layer: &Layer| layer.blob.as_ref().unwrap().namespace.to_string();
        assert_eq!((namespace(layer), namespace(twin)), ("one".into(), "other".into()));
    }
    let mut names: Vec<(String, String)> = driftd
        .jobs(3)
        .into_iter()
        .map(|job| {
            assert_eq!(job.chain, image.chain());
            (job.namespace, job.name)
        })
        .collect();
    names.sort();
    let expected =
        [("one", image.name.as_str()), ("one", second_name), ("other", image.name.as_str())];
    assert_eq!(names, expected.map(|(namespace, name)| (namespace.into(), name.into())));
}

#[test]
fn many_images_at_once_are_all_recorded() {
    const IMAGES: usize = 24;
    let (node, driftd) = connected();
    let images: Vec<TestImage> = (0..IMAGES)
        .map(|number| {
            let own = format!("{number}");
            TestImage::new(&format!("many-{number}"), &[&[("a", "1")], &[("own", &own)]])
        })
        .collect();
    std::thread::scope(|scope| {
        for (number, images) in images.chunks(IMAGES / 4).enumerate() {
            let node = &node;
            scope.spawn(move || {
                for image in images {
                    let archive = node.path(&format!("many-{number}.tar"));
                    image.write(&archive);
                    node.ctr(&["images", "import", archive.to_str().unwrap()]);
                }
            });
        }
    });
    let expected: BTreeSet<&str> = images.iter().map(|image| image.name.as_str()).collect();
    // An image is checked twice if its event comes after that of its layers.
    let jobs = wait_for("every image is recorded", || {
        let jobs = driftd.recorder.0.lock().unwrap().jobs.clone();
        let recorded: BTreeSet<&str> = jobs.iter().map(|job| job.name.as_str()).collect();
        if recorded == expected { Ok(jobs) } else { Err(jobs) }
    });
    for job in &jobs {
        let image = images.iter().find(|image| image.name == job.name).unwrap();
        assert_eq!((&job.layers, &job.archives), (&image.layer_ids(), &image.archives()));
    }
    driftd.until_problems(&[]);
    assert_eq!(driftd.health.losses(), []);
}

#[test]
fn with_a_snapshotter_of_whole_copies_the_archives_are_read() {
    let (node, mut driftd) = connected();
    let image = TestImage::new("native", &[&[("a", "1")], &[("b", "2")]]);
    // containerd 2's own import knows one snapshotter only; a run unpacks it.
    node.import_with(&image, &["--no-unpack"]);
    let id = unique("native");
    node.run_with(&image, &id, &["--snapshotter", "native"]);
    let container = driftd.until_container(&id, |container| container.task.is_some());
    assert_eq!(container.rootfs, None);
    assert_eq!(container.no_baseline, None);
    let archives = |container: &Container| -> Vec<Option<String>> {
        let digest = |layer: &Layer| layer.blob.as_ref().map(|blob| blob.digest.clone());
        container.layers.iter().map(digest).collect()
    };
    assert_eq!(
        (layer_ids(&container), archives(&container)),
        (image.layer_ids(), image.archives())
    );
    assert!(container.layers.iter().all(|layer| layer.directory.is_none()), "{container:?}");
    let job = &driftd.jobs(1)[0];
    assert_eq!((&job.layers, &job.files), (&image.layer_ids(), &vec![]));
    driftd.until_problems(&[]);

    // Without the archives, the whole copy is read as one layer.
    let discarded = TestImage::new("native-discarded", &[&[("a", "1")], &[("b", "3")]]);
    node.import_with(&discarded, &["--no-unpack"]);
    let id = unique("native-discarded");
    node.run_with(&discarded, &id, &["--snapshotter", "native"]);
    for archive in discarded.archives().into_iter().flatten() {
        node.ctr(&["content", "delete", &archive]);
    }
    let mut later = Driftd::start(&node);
    later.until_listed();
    let copy = LayerId::Chain(discarded.chain()[1]);
    wait_for("the copy is recorded", || {
        let jobs = later.recorder.0.lock().unwrap().jobs.clone();
        let job = jobs.iter().find(|job| job.name == discarded.name).cloned();
        job.filter(|job| job.layers == [copy]).ok_or(jobs)
    });
    assert_eq!(later.last_job_of(&discarded.name).files, [files(&["a", "b", "bin/busybox"])]);
    wait_for("nothing stays behind", || {
        let mut left = node.lines(&["snapshots", "--snapshotter", "native", "list"]);
        left.retain(|name| name.contains("driftd-view"));
        if left.is_empty() { Ok(()) } else { Err(left) }
    });
    // From then on the container has its baseline.
    node.ctr(&["tasks", "pause", &id]);
    assert_eq!(layer_ids(&later.until_paused(&id)), [copy]);

    // An unrecorded copy: the container has a reason for no baseline.
    let mut ignorant = Driftd::start_knowing_nothing(&node);
    ignorant.until_listed();
    let reason = ignorant.record(&id).no_baseline.unwrap_or_default();
    assert!(
        reason.starts_with("snapshotter native: it keeps whole copies, not layers, and layer "),
        "{reason}"
    );
}

#[test]
fn with_a_snapshotter_of_volumes_the_archives_are_read() {
    let mut node = Node::new();
    // The btrfs snapshotter needs its directory on a btrfs filesystem.
    let volume = node.path("btrfs.img");
    let place = node.path("root/io.containerd.snapshotter.v1.btrfs");
    std::fs::create_dir_all(&place).unwrap();
    std::fs::File::create(&volume).unwrap().set_len(256 << 20).unwrap();
    let run = |program: &str, arguments: &[&std::ffi::OsStr]| {
        let output = Command::new(program).args(arguments).output();
        let output = output.unwrap_or_else(|err| {
            panic!("{program} cannot be run (apt-get install btrfs-progs): {err}")
        });
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run("mkfs.btrfs", &["--quiet".as_ref(), volume.as_ref()]);
    run("mount", &["-o".as_ref(), "loop".as_ref(), volume.as_ref(), place.as_ref()]);
    node.start();
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    let image = TestImage::new("btrfs", &[&[("a", "1")], &[("b", "2")]]);
    node.import_with(&image, &["--no-unpack"]);
    let id = unique("btrfs");
    node.run_with(&image, &id, &["--snapshotter", "btrfs"]);
    let container = driftd.until_container(&id, |container| container.task.is_some());
    assert_eq!((layer_ids(&container), &container.no_baseline), (image.layer_ids(), &None));
    assert_eq!(container.rootfs, None);
    let job = &driftd.jobs(1)[0];
    assert_eq!((&job.archives, &job.files), (&image.archives(), &vec![]));

    // Nothing is left to read: the container and the image both have the reason.
    let discarded = TestImage::new("btrfs-discarded", &[&[("a", "1")], &[("b", "3")]]);
    node.import_with(&discarded, &["--no-unpack"]);
    let id = unique("btrfs-discarded");
    let [_, top] = &discarded.archives()[..] else { panic!() };
    node.ctr(&[
        "run",
        "--detach",
        "--null-io",
        "--snapshotter",
        "btrfs",
        &discarded.name,
        &id,
        "/bin/busybox",
        "sleep",
        "600",
    ]);
    node.ctr(&["content", "delete", top.as_deref().unwrap()]);
    let mut later = Driftd::start(&node);
    later.until_listed();
    let reason = later.record(&id).no_baseline.unwrap_or_default();
    let expected = format!(
        "snapshotter btrfs: it keeps volumes, not directories, and layer {} has no archive: it is \
         not in containerd's content store (discard_unpacked_layers removes it after the unpack, \
         and lazy snapshotters never fetch it)",
        discarded.diff_ids()[1]
    );
    assert_eq!(reason, expected);
    later.until_problems(&[&expected]);
}

#[test]
fn a_single_layer_and_a_read_only_rootfs_have_layers_too() {
    let node = Node::started();
    let pause = TestImage::new("pause", &[&[]]);
    let image = TestImage::new("read-only", &[&[("a", "1")], &[("b", "2")]]);
    node.import(&pause);
    node.import(&image);
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    let found = |container: &Container| -> Vec<BTreeSet<String>> {
        let directories = container.layers.iter().filter_map(|layer| layer.directory.as_deref());
        directories.map(files_below).collect()
    };
    for (image, expected) in [
        (&pause, vec![files(&["bin/busybox"])]),
        (&image, vec![files(&["a", "bin/busybox"]), files(&["b"])]),
    ] {
        for read_only in [false, true] {
            let id = unique(&format!("layers-{}-{read_only}", expected.len()));
            let arguments: &[&str] = if read_only { &["--read-only"] } else { &[] };
            node.run_with(image, &id, arguments);
            let container = driftd.until_container(&id, |container| container.task.is_some());
            assert_eq!(layer_ids(&container), image.layer_ids());
            assert_eq!(found(&container), expected);
            assert_eq!(container.no_baseline, None);
        }
    }
}

#[test]
fn a_runtime_with_its_own_kernel_is_the_reason_for_no_baseline() {
    let node = Node::started();
    let image = TestImage::new("sandboxed", &[&[("a", "1")]]);
    node.import(&image);
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    // runc under the name of gVisor's runtime.
    let runc = ["/usr/sbin/runc", "/usr/bin/runc", "/usr/local/sbin/runc"];
    let runc = runc.iter().find(|path| Path::new(path).exists()).expect("there is no runc");
    let runsc = node.path("runsc");
    std::os::unix::fs::symlink(runc, &runsc).unwrap();
    let id = unique("sandboxed");
    node.run_with(&image, &id, &["--runc-binary", runsc.to_str().unwrap()]);
    let container = driftd.until_container(&id, |container| container.task.is_some());
    assert_eq!(container.layers, []);
    assert_eq!(
        container.no_baseline.as_deref(),
        Some(
            "its runtime io.containerd.runc.v2 (gVisor) runs its programs on a kernel of their \
             own: this node's fanotify does not see what they execute"
        )
    );
    // Its image is recorded all the same.
    assert_eq!(driftd.jobs(1)[0].layers, image.layer_ids());
}

#[test]
fn a_container_in_a_user_namespace_has_its_images_layers() {
    let node = Node::started();
    let image = TestImage::new("userns", &[&[("a", "1")], &[("b", "2")]]);
    node.import(&image);
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    let id = unique("userns");
    node.ctr(&[
        "run",
        "--detach",
        "--null-io",
        "--uidmap",
        "0:100000:65536",
        "--gidmap",
        "0:200000:65536",
        &image.name,
        &id,
        "/bin/busybox",
        "sleep",
        "600",
    ]);
    let container = driftd.until_container(&id, |container| container.task.is_some());
    assert_eq!(layer_ids(&container), image.layer_ids());
    assert_eq!(container.no_baseline, None);
    let range = |host| vec![IdRange { container: 0, host, count: 65_536 }];
    let id_map = IdMap { uids: range(100_000), gids: range(200_000) };
    assert_eq!(container.id_map, Some(id_map));
    assert!(container.rootfs.is_some(), "{container:?}");
    let found: Vec<BTreeSet<String>> = container
        .layers
        .iter()
        .filter_map(|layer| layer.directory.as_deref())
        .map(files_below)
        .collect();
    assert_eq!(found, [files(&["a", "bin/busybox"]), files(&["b"])]);
}

#[test]
fn no_container_is_missed_whenever_driftd_connects() {
    const CONTAINERS: usize = 6;
    const CONNECTIONS: u64 = 4;
    let node = Node::started();
    let image = TestImage::new("meets", &[&[]]);
    node.import(&image);
    let ids: Vec<String> =
        (0..CONTAINERS).map(|number| unique(&format!("meets-{number}"))).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| ids.iter().for_each(|id| node.run(&image, id)));
        // Each connects at another moment while the containers start.
        for number in 0..CONNECTIONS {
            let (node, ids) = (&node, &ids);
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(170 * number));
                let mut driftd = Driftd::start(node);
                let mut running: BTreeMap<ContainerId, bool> = BTreeMap::new();
                driftd.until("all containers run", |change| {
                    match change {
                        RuntimeEvent::Container(container) => {
                            running.insert(container.id.clone(), container.task.is_some());
                        }
                        RuntimeEvent::TaskExited { container } => {
                            running.insert(container.clone(), false);
                        }
                        RuntimeEvent::Listed { containers, .. } => {
                            running.retain(|container, _| containers.contains(container));
                        }
                        RuntimeEvent::Connected { .. }
                        | RuntimeEvent::Disconnected { .. }
                        | RuntimeEvent::TaskCreated { .. }
                        | RuntimeEvent::ExecStarted { .. }
                        | RuntimeEvent::ExecExited { .. }
                        | RuntimeEvent::Removed { .. } => (),
                    }
                    ids.iter().all(|id| running.get(&default(id)) == Some(&true)).then_some(())
                });
            });
        }
    });
}

// --- probes ---

fn health_check(argv: &[&str]) -> Vec<DeclaredProbe> {
    let argv = argv.iter().map(|&argument| argument.to_owned()).collect();
    vec![DeclaredProbe { argv, source: ProbeSource::Healthcheck }]
}

#[test]
fn a_nerdctl_label_declares_a_health_check() {
    let node = Node::started();
    let mut image = TestImage::new("checked", &[&[("a", "1")]]);
    image.settings = serde_json::json!({
        "Healthcheck": {"Test": ["CMD-SHELL", "/from image"]}, "Shell": ["/bin/ash", "-c"],
    });
    node.import(&image);
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    let mut check = |name: &str, labels: &[&str], expected: Vec<DeclaredProbe>| {
        let id = unique(name);
        let labels: Vec<&str> = labels.iter().flat_map(|&label| ["--label", label]).collect();
        node.run_with(&image, &id, &labels);
        // The first record has everything.
        let container = driftd.until_container(&id, |_| true);
        assert_eq!(container.probes, expected, "{name}");
        assert_eq!(container.image.name.as_deref(), Some(image.name.as_str()));
        assert_eq!(container.image.manifest_digest, Some(image.manifest_digest()));
    };
    let label = r#"nerdctl/healthcheck={"Test":["CMD","/bin/busybox","true"],"Retries":3}"#;
    let off = r#"nerdctl/healthcheck={"Test":["NONE"]}"#;
    check("labelled", &[label], health_check(&["/bin/busybox", "true"]));
    check("switched-off", &["nerdctl/namespace=default", off], Vec::new());
    let of_image = health_check(&["/bin/ash", "-c", "/from image"]);
    check("nerdctls", &["nerdctl/namespace=default"], of_image);
    check("no-label", &[], Vec::new());
}

#[test]
fn dockers_config_declares_a_health_check() {
    let (node, mut driftd) = connected();
    let id = unique("dockers");
    // As with Docker's own storage: a separate rootfs, and no snapshot in containerd.
    let rootfs = node.path("docker/overlay2/m0/merged");
    std::fs::create_dir_all(rootfs.join("bin")).unwrap();
    std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
    let books = node.path("docker/containers").join(&id);
    std::fs::create_dir_all(&books).unwrap();
    let config =
        r#"{"Config":{"Image":"web:1","Healthcheck":{"Test":["CMD-SHELL","up || exit"]}}}"#;
    std::fs::write(books.join("config.v2.json"), config).unwrap();
    let label = "com.docker/engine.bundle.path=/run/docker";
    let mut run = vec!["run", "--detach", "--null-io", "--rootfs", "--label", label];
    run.extend([rootfs.to_str().unwrap(), &id, "/bin/busybox", "sleep", "600"]);
    node.ctr(&run);
    let container = driftd.until_container(&id, |_| true);
    assert_eq!(container.image.name.as_deref(), Some("web:1"));
    assert_eq!(container.probes, health_check(&["/bin/sh", "-c", "up || exit"]));
}

/// Creates a container record as the CRI plugin does, but without labels that name its pod.
fn file_cri_record(
    node: &Node,
    driftd: &Driftd,
    image: &TestImage,
    id: &str,
    extension: (&str, serde_json::Value),
    labels: &[(&str, &str)],
) {
    let any = |type_url: &str, value: serde_json::Value| prost_types::Any {
        type_url: type_url.into(),
        value: value.to_string().into_bytes(),
    };
    let (name, config) = extension;
    let metadata = serde_json::json!({ "Version": "v1", "Metadata": { "Config": config } });
    let metadata = any("github.com/containerd/cri/pkg/store/container/Metadata", metadata);
    let spec = serde_json::json!({ "ociVersion": "1.0.2" });
    let record = containerd_api::Container {
        id: id.into(),
        image: image.name.clone(),
        labels: labels.iter().map(|&(name, value)| (name.into(), value.into())).collect(),
        runtime: Some(Runtime { name: "io.containerd.runc.v2".into(), options: None }),
        spec: Some(any("types.containerd.io/opencontainers/runtime-spec/1/Spec", spec)),
        extensions: [(name.to_owned(), metadata)].into(),
        ..containerd_api::Container::default()
    };
    driftd.runtime.block_on(async {
        let channel = containerd_client::connect(node.socket()).await.unwrap();
        let request = CreateContainerRequest { container: Some(record) };
        let request = with_namespace!(request, "default");
        ContainersClient::new(channel).create(request).await.unwrap();
    });
}

#[test]
fn a_kubelets_request_names_the_pod_and_its_lifecycle_hook() {
    let node = Node::started();
    let mut image = TestImage::new("pod", &[&[]]);
    image.settings = serde_json::json!({"Healthcheck": {"Test": ["CMD", "/not/kubernetes"]}});
    node.import(&image);
    let mut driftd = Driftd::start(&node);
    driftd.until_listed();
    let web = Pod {
        namespace: "shop".into(),
        name: "web-1".into(),
        uid: "u".into(),
        container: Some("nginx".into()),
    };

    let id = unique("pods-container");
    let config = serde_json::json!({
        "metadata": {"name": "nginx"},
        "labels": {
            "io.kubernetes.pod.namespace": "shop",
            "io.kubernetes.pod.name": "web-1",
            "io.kubernetes.pod.uid": "u",
        },
        "annotations": {
            "io.kubernetes.container.preStopHandler":
                r#"{"exec":{"command":["/bin/sh","-c","sleep 20"]}}"#,
        },
    });
    let extension = ("io.cri-containerd.container.metadata", config);
    let check = r#"{"Test":["CMD","/not/kubernetes/either"]}"#;
    file_cri_record(&node, &driftd, &image, &id, extension, &[("nerdctl/healthcheck", check)]);
    let container = driftd.until_container(&id, |_| true);
    assert_eq!(container.pod.as_ref(), Some(&web));
    assert_eq!(container.image.name.as_deref(), Some(image.name.as_str()));
    let argv = ["/bin/sh", "-c", "sleep 20"].map(str::to_owned).into();
    assert_eq!(container.probes, [DeclaredProbe { argv, source: ProbeSource::LifecycleHook }]);

    let id = unique("pods-sandbox");
    let config = serde_json::json!({
        "metadata": {"name": "web-1", "uid": "u", "namespace": "shop"},
    });
    let extension = ("io.cri-containerd.sandbox.metadata", config);
    let labels = [("io.cri-containerd.kind", "sandbox"), ("io.kubernetes.container.name", "x")];
    file_cri_record(&node, &driftd, &image, &id, extension, &labels);
    let sandbox = driftd.until_container(&id, |_| true);
    assert_eq!(sandbox.pod, Some(Pod { container: None, ..web }));
    assert_eq!(sandbox.probes, []);
}
