//! What starts a killed container again, judged by what is known of it. Pure.
//!
//! containerd's restart monitor checks containers with the label
//! `containerd.io/restart.status` at an interval (10 s unless configured). What it does with
//! one whose status is `running` depends on containerd's version. Up to 1.6 the monitor starts
//! it whatever its policy is. From 1.7 on it follows `containerd.io/restart.policy`; a missing
//! and an empty policy mean `always`.

use std::collections::HashMap;

use crate::model::{Restarter, printable};

pub(super) const STATUS: &str = "containerd.io/restart.status";
const POLICY: &str = "containerd.io/restart.policy";
const COUNT: &str = "containerd.io/restart.count";
const EXPLICITLY_STOPPED: &str = "containerd.io/restart.explicitly-stopped";
pub(super) const STOPPED: &str = "stopped";
const RUNNING: &str = "running";
/// The first containerd whose monitor knows policies.
const WITH_POLICIES: Version = Version(1, 7);

type Labels = HashMap<String, String>;

/// A containerd's version, as far as its behaviour depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(u32, u32);

impl Version {
    /// Reads a version as containerd reports it: `v2.1.9`, `1.6.20~ds1`.
    pub(super) fn parse(text: &str) -> Option<Version> {
        let mut numbers = text.trim().trim_start_matches('v').split('.');
        let major = numbers.next()?.parse().ok()?;
        let minor = numbers.next()?;
        let end = minor.find(|digit: char| !digit.is_ascii_digit()).unwrap_or(minor.len());
        Some(Version(major, minor[..end].parse().ok()?))
    }
}

/// What is known of a killed container.
#[derive(Clone, Copy, Debug)]
pub(super) struct KilledContainer<'a> {
    pub(super) namespace: &'a str,
    pub(super) id: &'a str,
    pub(super) labels: &'a Labels,
    /// `None` if containerd did not report it.
    pub(super) version: Option<Version>,
    /// `None` if Docker did not make the container. Else its restart policy, if that could be
    /// read.
    pub(super) docker: Option<Option<&'a str>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Likelihood {
    Surely,
    Perhaps,
}

impl KilledContainer<'_> {
    fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name).map(String::as_str)
    }

    /// Whether containerd's restart monitor starts it again.
    pub(super) fn by_monitor(&self) -> Option<Likelihood> {
        if self.label(STATUS) != Some(RUNNING) {
            return None;
        }
        let by_policy = policy_restarts(self.labels);
        match self.version {
            Some(version) if version < WITH_POLICIES => Some(Likelihood::Surely),
            Some(_) => by_policy.then_some(Likelihood::Surely),
            None if by_policy => Some(Likelihood::Surely),
            None => Some(Likelihood::Perhaps),
        }
    }

    /// What starts the container again, with a text for administrators.
    pub(super) fn sequel(&self) -> Option<(Restarter, String)> {
        if let Some(likelihood) = self.by_monitor() {
            return Some((Restarter::RestartMonitor, self.monitors(likelihood)));
        }
        if let Some(policy) = self.docker {
            return self.dockers(policy).map(|text| (Restarter::Docker, text));
        }
        let text = match self.label("io.cri-containerd.kind")? {
            "container" => {
                "unless the pod's restartPolicy is Never, the kubelet starts another container \
                 from the image in its place, at once at first and after up to 5 minutes if that \
                 is repeated; what was changed in this container's own files is not in that one, \
                 what lies on volumes is"
            }
            "sandbox" => {
                "the kubelet makes the pod's sandbox anew and, unless the pod's restartPolicy is \
                 Never, its containers from their images; what lies on volumes stays"
            }
            _ => return None,
        };
        Some((Restarter::Kubelet, text.to_owned()))
    }

    fn monitors(&self, likelihood: Likelihood) -> String {
        let verb = match likelihood {
            Likelihood::Surely => "starts",
            Likelihood::Perhaps => "may start",
        };
        let (namespace, id) = (printable(self.namespace.as_bytes()), printable(self.id.as_bytes()));
        format!(
            "containerd's restart monitor {verb} it again within its interval (10 s unless \
             configured), with the same files, so the drift stays; `respond kill --no-restart`, \
             or `ctr -n {namespace} containers label {id} {STATUS}={STOPPED}` before the kill, \
             keeps it stopped"
        )
    }

    fn dockers(&self, policy: Option<&str>) -> Option<String> {
        let (when, policy) = match policy {
            Some("" | "no") => return None,
            Some(policy) => {
                ("Docker starts", format!("restart policy {}", printable(policy.as_bytes())))
            }
            None => {
                ("if it has a restart policy, Docker starts", "it could not be read".to_owned())
            }
        };
        Some(format!(
            "{when} it again within a second ({policy}; later after a repeated kill), with the \
             same files, so the drift stays; `respond kill --no-restart`, or `docker update \
             --restart=no {}` before the kill, keeps it stopped",
            printable(self.id.as_bytes())
        ))
    }
}

/// Whether the policy restarts a killed container (exit status 137, by a signal).
fn policy_restarts(labels: &Labels) -> bool {
    let label = |name: &str| labels.get(name).map_or("", String::as_str);
    let (name, most) = match label(POLICY).split_once(':') {
        Some((name, most)) => (name, Some(most)),
        None => (label(POLICY), None),
    };
    match (name, most) {
        ("" | "always", None) => true,
        ("unless-stopped", None) => !is_true(label(EXPLICITLY_STOPPED)),
        ("on-failure", most) => {
            // containerd reads the number up to the next colon.
            let most = most.map_or("0", |most| most.split(':').next().unwrap_or_default());
            let count = if label(COUNT).is_empty() { "0" } else { label(COUNT) };
            match (most.parse::<i64>(), count.parse::<i64>()) {
                (Ok(most), Ok(count)) => most == 0 || count < most,
                _ => false,
            }
        }
        // `no`, and policies that containerd refuses.
        _ => false,
    }
}

/// Reads a boolean like Go's strconv.ParseBool. A text that Go refuses is false.
fn is_true(text: &str) -> bool {
    matches!(text, "1" | "t" | "T" | "TRUE" | "true" | "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    fn known(labels: &Labels, version: Option<Version>) -> KilledContainer<'_> {
        KilledContainer { namespace: "default", id: "web", labels, version, docker: None }
    }

    const V1_6: Option<Version> = Some(Version(1, 6));
    const V1_7: Option<Version> = Some(Version(1, 7));
    const V2_1: Option<Version> = Some(Version(2, 1));

    #[test]
    fn versions_are_read_as_distributions_write_them() {
        for (text, expected) in [
            ("1.6.20~ds1", V1_6),
            ("v1.7.27", V1_7),
            ("v2.1.9", V2_1),
            ("2.1", V2_1),
            ("1.7-rc.1", V1_7),
            ("v2.10.0+unknown", Some(Version(2, 10))),
            ("", None),
            ("dev", None),
            ("2", None),
            ("v2.x", None),
        ] {
            assert_eq!(Version::parse(text), expected, "{text}");
        }
    }

    /// As it was tried with containerd 1.6.20, 1.7, 2.1.9 and 2.3.4.
    #[test]
    fn d01_what_the_restart_monitor_does_depends_on_its_labels_and_on_containerds_version() {
        use Likelihood::{Perhaps, Surely};
        let stopped = (EXPLICITLY_STOPPED, "true");
        for (more, in_1_6, since_1_7, unknown) in [
            (&[][..], Some(Surely), Some(Surely), Some(Surely)),
            (&[(POLICY, "")][..], Some(Surely), Some(Surely), Some(Surely)),
            (&[(POLICY, "always"), stopped], Some(Surely), Some(Surely), Some(Surely)),
            (&[stopped], Some(Surely), Some(Surely), Some(Surely)),
            (&[(POLICY, "no")], Some(Surely), None, Some(Perhaps)),
            (&[(POLICY, "unless-stopped")], Some(Surely), Some(Surely), Some(Surely)),
            (&[(POLICY, "unless-stopped"), stopped], Some(Surely), None, Some(Perhaps)),
            (
                &[(POLICY, "unless-stopped"), (EXPLICITLY_STOPPED, "yes")],
                Some(Surely),
                Some(Surely),
                Some(Surely),
            ),
            (&[(POLICY, "on-failure")], Some(Surely), Some(Surely), Some(Surely)),
            (&[(POLICY, "on-failure:2"), (COUNT, "1")], Some(Surely), Some(Surely), Some(Surely)),
            (&[(POLICY, "on-failure:1"), (COUNT, "1")], Some(Surely), None, Some(Perhaps)),
            (&[(POLICY, "on-failure:x")], Some(Surely), None, Some(Perhaps)),
            (&[(POLICY, "always:3")], Some(Surely), None, Some(Perhaps)),
            (&[(POLICY, "sometimes")], Some(Surely), None, Some(Perhaps)),
        ] {
            let labels = labels(&[&[(STATUS, RUNNING)], more].concat());
            for (version, expected) in
                [(V1_6, in_1_6), (V1_7, since_1_7), (V2_1, since_1_7), (None, unknown)]
            {
                assert_eq!(
                    known(&labels, version).by_monitor(),
                    expected,
                    "{labels:?} {version:?}"
                );
            }
        }
        for without in [&[][..], &[(STATUS, STOPPED)], &[(POLICY, "always")]] {
            let labels = labels(without);
            assert_eq!(known(&labels, V1_6).sequel(), None, "{labels:?}");
        }
    }

    #[test]
    fn d01_each_engine_is_named_with_what_keeps_the_container_stopped() {
        let check = |known: &KilledContainer<'_>, expected: Option<(Restarter, &[&str])>| {
            let found = known.sequel();
            let (Some((restarter, text)), Some((expected, parts))) = (&found, expected) else {
                assert_eq!(found.map(|(restarter, _)| restarter), expected.map(|(one, _)| one));
                return;
            };
            assert_eq!(*restarter, expected, "{text}");
            for part in parts {
                assert!(text.contains(part), "{part} is missing: {text}");
            }
            assert!(!text.contains("remove its restart policy"), "{text}");
        };
        let monitored = labels(&[(STATUS, RUNNING)]);
        let advice = "ctr -n default containers label web containerd.io/restart.status=stopped";
        let parts = [advice, "--no-restart", "10 s", "same files"];
        check(&known(&monitored, V2_1), Some((Restarter::RestartMonitor, &parts)));
        let nothing = labels(&[]);
        let dockers = |policy| KilledContainer { docker: Some(policy), ..known(&nothing, V1_7) };
        let advice = "docker update --restart=no web";
        let parts = [advice, "Docker starts it again", "(restart policy always;"];
        check(&dockers(Some("always")), Some((Restarter::Docker, &parts)));
        let parts = [advice, "if it has a restart policy"];
        check(&dockers(None), Some((Restarter::Docker, &parts)));
        check(&dockers(Some("no")), None);
        check(&dockers(Some("")), None);
        let pods = labels(&[("io.cri-containerd.kind", "container")]);
        let parts = ["kubelet", "restartPolicy is Never", "another container", "volumes"];
        check(&known(&pods, V1_7), Some((Restarter::Kubelet, &parts)));
        let sandbox = labels(&[("io.cri-containerd.kind", "sandbox")]);
        check(&known(&sandbox, V1_7), Some((Restarter::Kubelet, &["sandbox anew"])));
        check(&known(&nothing, V1_7), None);
    }
}
