//! containerd's events, decoded. Pure: values in, values out.
//!
//! Knows which events driftd subscribes to, which of them are urgent and which may be dropped
//! first. Sending them on is the endpoint's business.

use containerd_client::events::{
    ContainerCreate, ContainerDelete, ContainerUpdate, SnapshotCommit, TaskCreate, TaskDelete,
    TaskExecStarted, TaskExit, TaskPaused, TaskResumed, TaskStart,
};
use containerd_client::services::v1::{ImageCreate, ImageDelete, ImageUpdate};
use containerd_client::types::Envelope;
use jiff::Timestamp;
use prost::Message;

use super::changes::Urgent;
use super::snapshots;
use crate::model::{ChainId, ContainerId, Exit, OverlayDirs};

/// An event of containerd's, as far as driftd needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    TaskCreated {
        container: ContainerId,
        pid: u32,
        rootfs: Option<OverlayDirs>,
    },
    /// The init process has ended, not merely a process that was started in the container
    /// later.
    TaskExited {
        container: ContainerId,
        pid: u32,
    },
    ExecStarted {
        container: ContainerId,
        exec_id: String,
        pid: u32,
    },
    ExecExited {
        container: ContainerId,
        exec_id: String,
        pid: u32,
        exit: Exit,
        at: Timestamp,
    },
    /// The container's record or the state of its task has changed.
    ContainerChanged {
        container: ContainerId,
    },
    ContainerRemoved {
        container: ContainerId,
    },
    ImageChanged {
        namespace: String,
        name: String,
    },
    ImageRemoved {
        namespace: String,
        name: String,
    },
    /// A layer has been unpacked.
    LayerCommitted {
        namespace: String,
        chain_id: ChainId,
    },
    /// driftd's own marker: the subscription is in place.
    Marker,
}

impl Event {
    /// The containerd namespace of the event; `None` for driftd's own marker.
    pub(super) fn namespace(&self) -> Option<&str> {
        match self {
            Event::TaskCreated { container, .. }
            | Event::TaskExited { container, .. }
            | Event::ExecStarted { container, .. }
            | Event::ExecExited { container, .. }
            | Event::ContainerChanged { container }
            | Event::ContainerRemoved { container } => Some(&container.namespace),
            Event::ImageChanged { namespace, .. }
            | Event::ImageRemoved { namespace, .. }
            | Event::LayerCommitted { namespace, .. } => Some(namespace),
            Event::Marker => None,
        }
    }

    /// The change that the watchers receive at once, if this is one.
    pub(super) fn urgent(&self) -> Option<Urgent> {
        match self {
            Event::TaskCreated { container, pid, rootfs } => Some(Urgent::TaskCreated {
                container: container.clone(),
                pid: *pid,
                rootfs: rootfs.clone(),
            }),
            // Without a pid it is not known which run has ended.
            Event::TaskExited { container, pid } if *pid != 0 => {
                Some(Urgent::TaskExited { container: container.clone(), pid: *pid })
            }
            _ => None,
        }
    }

    /// Whether it concerns a process that was started in a container later. Health probes cause
    /// such events every few seconds in every container. No list depends on them, so they are
    /// the first to be dropped.
    pub(super) fn is_of_exec(&self) -> bool {
        match self {
            Event::ExecStarted { .. } | Event::ExecExited { .. } => true,
            Event::TaskCreated { .. }
            | Event::TaskExited { .. }
            | Event::ContainerChanged { .. }
            | Event::ContainerRemoved { .. }
            | Event::ImageChanged { .. }
            | Event::ImageRemoved { .. }
            | Event::LayerCommitted { .. }
            | Event::Marker => false,
        }
    }
}

/// The filters of the subscription, which containerd combines with OR. Other topics are neither
/// sent nor decoded; one of them is `/tasks/exec-added`, which comes without a pid, and also for
/// execs that are never started.
pub(super) fn filters(marker: &str) -> Vec<String> {
    [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/delete",
        "/tasks/paused",
        "/tasks/resumed",
        "/containers/create",
        "/containers/update",
        "/containers/delete",
        "/images/create",
        "/images/update",
        "/images/delete",
        "/snapshot/commit",
        marker,
    ]
    .into_iter()
    .map(|topic| format!("topic==\"{topic}\""))
    .collect()
}

/// Decodes an event. `Ok(None)` for one that driftd does not need. `received` is when it came.
///
/// containerd's type URLs have no `/` (`containerd.events.TaskCreate`), which
/// `Any::to_msg` refuses; so the last path segment is compared.
pub(super) fn decode(
    envelope: &Envelope,
    marker: &str,
    received: Timestamp,
) -> Result<Option<Event>, prost::DecodeError> {
    if envelope.topic == marker {
        return Ok(Some(Event::Marker));
    }
    let Some(any) = &envelope.event else { return Ok(None) };
    let value = any.value.as_slice();
    let type_name = any.type_url.rsplit('/').next().unwrap_or_default();
    let container = |id: &str| ContainerId::new(&envelope.namespace, id);
    let namespace = || envelope.namespace.clone();

    let event = match type_name {
        "containerd.events.TaskCreate" => task_created(&TaskCreate::decode(value)?, container),
        "containerd.events.TaskExit" => {
            let event = TaskExit::decode(value)?;
            return Ok(exited(event, envelope.timestamp, received, container));
        }
        "containerd.events.TaskExecStarted" => {
            let TaskExecStarted { container_id, exec_id, pid } = TaskExecStarted::decode(value)?;
            if exec_id.is_empty() || pid == 0 {
                return Ok(None);
            }
            Event::ExecStarted { container: container(&container_id), exec_id, pid }
        }
        // Not taken for an exit: it may come late, after the creation of the next task, or not
        // at all. The record is requested instead.
        "containerd.events.TaskDelete" => {
            let event = TaskDelete::decode(value)?;
            Event::ContainerChanged { container: container(&event.container_id) }
        }
        // A task that was restored from a checkpoint has its process only now.
        "containerd.events.TaskStart" => Event::ContainerChanged {
            container: container(&TaskStart::decode(value)?.container_id),
        },
        "containerd.events.TaskPaused" => Event::ContainerChanged {
            container: container(&TaskPaused::decode(value)?.container_id),
        },
        "containerd.events.TaskResumed" => Event::ContainerChanged {
            container: container(&TaskResumed::decode(value)?.container_id),
        },
        "containerd.events.ContainerCreate" => {
            Event::ContainerChanged { container: container(&ContainerCreate::decode(value)?.id) }
        }
        "containerd.events.ContainerUpdate" => {
            Event::ContainerChanged { container: container(&ContainerUpdate::decode(value)?.id) }
        }
        "containerd.events.ContainerDelete" => {
            Event::ContainerRemoved { container: container(&ContainerDelete::decode(value)?.id) }
        }
        "containerd.services.images.v1.ImageCreate" => {
            Event::ImageChanged { namespace: namespace(), name: ImageCreate::decode(value)?.name }
        }
        "containerd.services.images.v1.ImageUpdate" => {
            Event::ImageChanged { namespace: namespace(), name: ImageUpdate::decode(value)?.name }
        }
        "containerd.services.images.v1.ImageDelete" => {
            Event::ImageRemoved { namespace: namespace(), name: ImageDelete::decode(value)?.name }
        }
        "containerd.events.SnapshotCommit" => {
            match SnapshotCommit::decode(value)?.name.parse() {
                Ok(chain_id) => Event::LayerCommitted { namespace: namespace(), chain_id },
                // Another program's own snapshot, not a layer of an image.
                Err(_) => return Ok(None),
            }
        }
        _ => return Ok(None),
    };
    Ok(Some(event))
}

fn task_created(event: &TaskCreate, container: impl Fn(&str) -> ContainerId) -> Event {
    let container = container(&event.container_id);
    if event.pid == 0 {
        // Restored from a checkpoint: it has a process only once it is started.
        return Event::ContainerChanged { container };
    }
    let rootfs = snapshots::overlay_dirs(&event.rootfs);
    Event::TaskCreated { container, pid: event.pid, rootfs }
}

/// The end of an init or of an exec.
fn exited(
    event: TaskExit,
    published: Option<prost_types::Timestamp>,
    received: Timestamp,
    container: impl Fn(&str) -> ContainerId,
) -> Option<Event> {
    let container = container(&event.container_id);
    if event.id == event.container_id {
        return Some(Event::TaskExited { container, pid: event.pid });
    }
    if event.id.is_empty() {
        return None;
    }
    Some(Event::ExecExited {
        container,
        exec_id: event.id,
        pid: event.pid,
        exit: Exit::from_shell_status(event.exit_status),
        at: exited_at(event.exited_at, published, received),
    })
}

/// When a process ended. A shim that lost the time sends none, or Go's zero in the year 1. A
/// time after the event's own is wrong too. Then the event's own time is taken, and if that is
/// no better, the time at which it was received.
fn exited_at(
    ended: Option<prost_types::Timestamp>,
    published: Option<prost_types::Timestamp>,
    received: Timestamp,
) -> Timestamp {
    let sensible = |time: Option<prost_types::Timestamp>, latest: Timestamp| {
        let time = time.and_then(|time| Timestamp::new(time.seconds, time.nanos).ok())?;
        (Timestamp::UNIX_EPOCH < time && time <= latest).then_some(time)
    };
    let published = sensible(published, received).unwrap_or(received);
    sensible(ended, published).unwrap_or(published)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use containerd_client::types::Mount;

    use super::*;

    const MARKER: &str = "/driftd/subscribed/1";

    fn envelope(topic: &str, type_url: &str, event: &impl Message) -> Envelope {
        Envelope {
            timestamp: None,
            namespace: "k8s.io".into(),
            topic: topic.into(),
            event: Some(prost_types::Any {
                type_url: type_url.into(),
                value: event.encode_to_vec(),
            }),
        }
    }

    #[track_caller]
    fn check(type_url: &str, event: &impl Message, expected: Option<Event>) {
        assert_eq!(decode(&envelope("/topic", type_url, event), MARKER, at(9)), Ok(expected));
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn container() -> ContainerId {
        ContainerId::new("k8s.io", "c1")
    }

    #[test]
    fn a_created_task_names_its_overlay() {
        let event = TaskCreate {
            container_id: "c1".into(),
            pid: 42,
            rootfs: vec![Mount {
                r#type: "overlay".into(),
                source: "overlay".into(),
                target: String::new(),
                options: vec![
                    "index=off".into(),
                    "workdir=/s/3/work".into(),
                    "upperdir=/s/3/fs".into(),
                    "lowerdir=/s/2/fs:/s/1/fs".into(),
                ],
            }],
            ..TaskCreate::default()
        };
        let rootfs = Some(OverlayDirs {
            upperdir: "/s/3/fs".into(),
            lowerdirs: ["/s/2/fs", "/s/1/fs"].map(PathBuf::from).into(),
        });
        let expected = Event::TaskCreated { container: container(), pid: 42, rootfs };
        check("containerd.events.TaskCreate", &event, Some(expected.clone()));
        check("type.googleapis.com/containerd.events.TaskCreate", &event, Some(expected));
    }

    #[test]
    fn d05_a_task_without_a_process_is_requested_again_once_it_is_started() {
        let changed = || Some(Event::ContainerChanged { container: container() });
        let created = TaskCreate { container_id: "c1".into(), pid: 0, ..TaskCreate::default() };
        check("containerd.events.TaskCreate", &created, changed());
        let started = TaskStart { container_id: "c1".into(), pid: 42 };
        check("containerd.events.TaskStart", &started, changed());
        assert!(filters(MARKER).contains(&"topic==\"/tasks/start\"".to_owned()));
    }

    #[test]
    fn only_the_end_of_init_ends_a_task() {
        let exit =
            |id: &str| TaskExit { container_id: "c1".into(), id: id.into(), ..TaskExit::default() };
        let ended = Event::TaskExited { container: container(), pid: 0 };
        assert_eq!(ended.urgent(), None, "the event does not name the run");
        check("containerd.events.TaskExit", &exit("c1"), Some(ended));
        check("containerd.events.TaskExit", &exit(""), None);
        let ended = Event::ExecExited {
            container: container(),
            exec_id: "some-exec".into(),
            pid: 0,
            exit: Exit { code: Some(0), signal: None },
            at: at(9),
        };
        check("containerd.events.TaskExit", &exit("some-exec"), Some(ended));
    }

    #[test]
    fn h08_a_task_that_comes_or_goes_is_urgent() {
        let (container, rootfs) = (container(), None);
        let created = Event::TaskCreated { container: container.clone(), pid: 7, rootfs };
        let urgent = Urgent::TaskCreated { container: container.clone(), pid: 7, rootfs: None };
        assert_eq!(created.urgent(), Some(urgent));
        let exited = Event::TaskExited { container: container.clone(), pid: 7 };
        let urgent = Urgent::TaskExited { container: container.clone(), pid: 7 };
        assert_eq!(exited.urgent(), Some(urgent));
        assert_eq!(Event::ContainerChanged { container }.urgent(), None);
    }

    #[test]
    fn an_exec_begins_and_ends() {
        let begun = |exec_id: &str, pid| TaskExecStarted {
            container_id: "c1".into(),
            exec_id: exec_id.into(),
            pid,
        };
        let expected = Event::ExecStarted { container: container(), exec_id: "e1".into(), pid: 42 };
        assert!(expected.is_of_exec());
        assert_eq!(expected.namespace(), Some("k8s.io"));
        check("containerd.events.TaskExecStarted", &begun("e1", 42), Some(expected));
        check("containerd.events.TaskExecStarted", &begun("", 42), None);
        check("containerd.events.TaskExecStarted", &begun("e1", 0), None);

        let ended = |exit_status| TaskExit {
            container_id: "c1".into(),
            id: "e1".into(),
            pid: 42,
            exit_status,
            exited_at: Some(prost_types::Timestamp { seconds: 8, nanos: 500_000_000 }),
        };
        let expected = |code, signal| Event::ExecExited {
            container: container(),
            exec_id: "e1".into(),
            pid: 42,
            exit: Exit { code, signal },
            at: Timestamp::new(8, 500_000_000).unwrap(),
        };
        assert!(expected(None, None).is_of_exec());
        assert_eq!(expected(None, None).namespace(), Some("k8s.io"));
        check("containerd.events.TaskExit", &ended(0), Some(expected(Some(0), None)));
        check("containerd.events.TaskExit", &ended(3), Some(expected(Some(3), None)));
        check("containerd.events.TaskExit", &ended(137), Some(expected(None, Some(9))));
        check("containerd.events.TaskExit", &ended(u32::MAX), Some(expected(Some(255), None)));
    }

    #[test]
    fn an_end_has_a_time_whatever_the_event_contains() {
        let check = |ended: Option<i64>, published: Option<i64>, expected| {
            let time = |seconds| prost_types::Timestamp { seconds, nanos: 0 };
            let found = exited_at(ended.map(time), published.map(time), at(9));
            assert_eq!(found, at(expected), "{ended:?} {published:?}");
        };
        check(Some(7), Some(8), 7);
        check(None, Some(8), 8);
        check(None, None, 9);
        check(Some(7), None, 7);
        check(Some(0), Some(8), 8);
        // Go's zero.
        check(Some(-62_135_596_800), Some(8), 8);
        check(Some(-62_135_596_800), Some(-62_135_596_800), 9);
        // In the future, and out of range.
        check(Some(12), Some(8), 8);
        check(Some(i64::MAX), Some(i64::MIN), 9);
        check(Some(7), Some(12), 7);
    }

    #[test]
    fn images_live_in_another_proto_package() {
        let name = "docker.io/library/busybox:1".to_owned();
        let event = ImageCreate { name: name.clone(), ..ImageCreate::default() };
        let changed = Event::ImageChanged { namespace: "k8s.io".into(), name };
        check("containerd.services.images.v1.ImageCreate", &event, Some(changed));
        check("containerd.events.ImageCreate", &event, None);
    }

    #[test]
    fn only_committed_layers_count() {
        let chain_id = ChainId([7; 32]);
        let commit = |name: String| SnapshotCommit { name, ..SnapshotCommit::default() };
        check(
            "containerd.events.SnapshotCommit",
            &commit(chain_id.to_string()),
            Some(Event::LayerCommitted { namespace: "k8s.io".into(), chain_id }),
        );
        check("containerd.events.SnapshotCommit", &commit("mine".into()), None);
    }

    #[test]
    fn the_marker_is_known_by_its_topic() {
        let marker = envelope(MARKER, "google.protobuf.Empty", &());
        assert_eq!(decode(&marker, MARKER, at(9)), Ok(Some(Event::Marker)));
        assert_eq!(decode(&marker, "/driftd/subscribed/2", at(9)), Ok(None));
    }

    #[test]
    fn a_broken_event_is_an_error_and_an_unknown_one_is_not() {
        let mut broken = envelope("/tasks/create", "containerd.events.TaskCreate", &());
        broken.event.as_mut().unwrap().value = vec![0xff; 3];
        assert!(decode(&broken, MARKER, at(9)).is_err(), "{broken:?}");
        check("containerd.events.TaskOOM", &(), None);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(value: Vec<u8>, which in 0..6_usize) {
            let type_url = [
                "containerd.events.TaskCreate",
                "containerd.events.SnapshotCommit",
                "containerd.services.images.v1.ImageUpdate",
                "containerd.events.ContainerUpdate",
                "containerd.events.TaskExit",
                "containerd.events.TaskExecStarted",
            ][which];
            let mut event = envelope("/x", type_url, &());
            event.event.as_mut().unwrap().value = value;
            let _ = decode(&event, MARKER, at(9));
        }

        #[test]
        fn no_time_makes_the_decoder_panic(seconds: [i64; 2], nanos: [i32; 2]) {
            let time = |which: usize| {
                Some(prost_types::Timestamp { seconds: seconds[which], nanos: nanos[which] })
            };
            let found = exited_at(time(0), time(1), at(9));
            assert!(Timestamp::UNIX_EPOCH < found && found <= at(9), "{found}");
        }
    }
}
