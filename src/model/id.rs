//! IDs of findings, sessions, probes and cases of evidence: hashes of what they identify.
//!
//! `FindingId::new` is in `finding`, those of sessions and probes are in `session`.

use jiff::Timestamp;

use super::container::{ContainerId, Incarnation};
use super::unknown::UnknownName;

/// Makes a type of 16 bytes, written as 32 hexadecimal digits: the hash of its parts, each
/// preceded by its length, so that no two lists of parts collide.
macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $see:literal) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
        )]
        #[serde(into = "String", try_from = "String")]
        pub struct $name(pub [u8; 16]);

        impl $name {
            pub(super) fn of(parts: &[&[u8]]) -> $name {
                let mut hasher = blake3::Hasher::new();
                for part in parts {
                    hasher.update(&(part.len() as u64).to_le_bytes());
                    hasher.update(part);
                }
                let mut id = [0; 16];
                id.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
                $name(id)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(self, f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = UnknownName;
            fn from_str(text: &str) -> Result<$name, Self::Err> {
                parse(text).map($name).ok_or_else(|| {
                    Self::Err::new(
                        text,
                        $what,
                        concat!("32 hexadecimal digits, see `", $see, "`"),
                    )
                })
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }

        impl TryFrom<String> for $name {
            type Error = UnknownName;
            fn try_from(text: String) -> Result<$name, Self::Error> {
                text.parse()
            }
        }
    };
}

id! {
    /// A finding's ID: the same container, kind, path and content (for a session: the same
    /// process; for a layer: the layer too) always give the same ID, so that a scan after a
    /// restart recognises what was reported already.
    FindingId, "finding", "driftd findings"
}

id! {
    /// A session's ID: the same container and process always give the same ID, so that a
    /// session that goes on is recognised after a restart.
    SessionId, "session", "driftd sessions"
}

id! {
    /// A probe's ID: the same container and arguments always give the same ID.
    ProbeId, "probe", "driftd probes"
}

id! {
    /// The ID of a case of evidence: the same run of a container and the same finding always
    /// give the same ID, so that later sightings add to one case.
    CaseId, "case of evidence", "driftd evidence ls"
}

impl CaseId {
    /// `at` separates cases that a user takes without a finding.
    pub fn new(
        container: &ContainerId,
        run: Option<Incarnation>,
        finding: Option<FindingId>,
        at: Option<Timestamp>,
    ) -> CaseId {
        let (pid, start_time) = run.map_or((0, 0), |run| (run.pid, run.start_time.unwrap_or(0)));
        let at = at.map_or(0, Timestamp::as_microsecond).to_le_bytes();
        CaseId::of(&[
            b"case",
            container.namespace.as_bytes(),
            container.id.as_bytes(),
            &pid.to_le_bytes(),
            &start_time.to_le_bytes(),
            finding.as_ref().map_or(&[], |finding| &finding.0[..]),
            &at,
        ])
    }
}

/// 32 hexadecimal digits.
fn parse(text: &str) -> Option<[u8; 16]> {
    let digits = Some(text).filter(|text| text.len() == 32 && text.is_ascii())?;
    let mut id = [0; 16];
    for (index, byte) in id.iter_mut().enumerate() {
        *byte = u8::from_str_radix(digits.get(index * 2..index * 2 + 2)?, 16).ok()?;
    }
    Some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_is_that_of_one_run_and_one_finding() {
        let container = ContainerId::new("default", "web");
        let run =
            |start_time| Incarnation { pid: 7, start_time: Some(start_time), created_at: None };
        let finding = Some(FindingId([1; 16]));
        let case =
            |start_time, finding, at| CaseId::new(&container, Some(run(start_time)), finding, at);
        let first = case(1, finding, None);
        assert_eq!(first, case(1, finding, None));
        let described = Incarnation { created_at: Some(Timestamp::UNIX_EPOCH), ..run(1) };
        // The run may be known before containerd has described its container.
        assert_eq!(first, CaseId::new(&container, Some(described), finding, None));
        let others = [
            case(2, finding, None),
            case(1, Some(FindingId([2; 16])), None),
            case(1, None, None),
            case(1, None, Some(Timestamp::MAX)),
            CaseId::new(&ContainerId::new("default", "api"), Some(run(1)), finding, None),
        ];
        assert!(!others.contains(&first), "{first} {others:?}");
    }
}
