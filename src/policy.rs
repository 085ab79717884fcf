//! Decides what to do about a finding: report it, or kill the container. Pure: the settings
//! and the kind of a finding in, a verdict out. The pipeline requests no automatic response
//! without such a verdict.

use jiff::SignedDuration;

use crate::config::{Config, Respond};
use crate::model::{Disposition, Kind, PathGlobs, Verdict};

/// The rules in force, with the number of times that they were replaced: the verdict names
/// the policy that it was decided by.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    pub generation: u64,
    pub respond: Respond,
    /// The paths at which a new or changed file is `file.persistence`.
    pub persistence: PathGlobs,
    /// How long a command that the runtime executes waits for a rhythm before it is reported:
    /// a command that comes again and again is a probe.
    pub probe_patience: SignedDuration,
}

impl Policy {
    /// The policy that the settings describe.
    pub fn of(config: &Config) -> Policy {
        Policy {
            generation: 1,
            respond: config.respond.clone(),
            persistence: config.watch.persistence.clone(),
            probe_patience: config.watch.probe_patience.try_into().unwrap_or_default(),
        }
    }

    pub fn decide(&self, kind: Kind) -> Verdict {
        let kill = self.respond.kill_on.contains(&kind);
        Verdict {
            disposition: if kill { Disposition::Kill } else { Disposition::Report },
            action: kill.then(|| "kill".to_owned()),
            rule: kill.then(|| "respond.kill_on".to_owned()),
            policy_generation: self.generation,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_of_the_box_it_only_reports() {
        let policy = Policy::default();
        for kind in Kind::ALL {
            assert_eq!(policy.decide(*kind).disposition, Disposition::Report, "{kind}");
        }
    }

    #[test]
    fn a_chosen_kind_kills_and_names_the_setting_that_decided() {
        let respond = Respond { kill_on: [Kind::ExecNew].into() };
        let policy = Policy { generation: 3, respond, ..Policy::default() };
        assert_eq!(
            policy.decide(Kind::ExecNew),
            Verdict {
                disposition: Disposition::Kill,
                action: Some("kill".into()),
                rule: Some("respond.kill_on".into()),
                policy_generation: 3,
            }
        );
        assert_eq!(policy.decide(Kind::FileAdded).disposition, Disposition::Report);
    }
}
