//! Decides what happens to a finding: it is reported, accepted as expected, or answered.
//!
//! ```text
//! files, signature ─> parse ─> rule, condition ─> set ─> Policy ── decide(finding) ─> Decision
//! ```
//!
//! Deciding is pure: the rules, a finding and a time in, a decision out. The pipeline requests no
//! automatic response without one. Only `files` reads the disk.

mod condition;
mod files;
mod images;
mod limits;
mod parse;
mod rule;
mod set;
mod signature;
mod source;
pub mod suggest;
#[cfg(test)]
mod tests;
mod text;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

pub use self::condition::Subject;
pub use self::files::{MAX_FILE, Owners, profile_names, read, read_profiles};
pub use self::limits::AnswerLimits;
pub use self::parse::{Loaded, parse};
pub use self::rule::{Effect, Place, Rule};
pub use self::set::{MAX_RULES, Matched, Reason, RuleSet};
pub use self::source::{Fault, PolicyFile, Refused};
pub use crate::config::Hook;
use crate::config::{Config, ContainerMode, Enforce, OnDoubt};
use crate::model::{Disposition, Finding, Kind, PathGlobs, RuleAnswer, Severity, Verdict};

/// The JSON Schema of a policy file.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(text::FileText).into()
}

/// The ID of the rule that the setting `respond.kill_on` makes.
pub const KILL_ON: &str = "respond.kill_on";

/// The rules in force, with the number of times that they were replaced: the verdict names
/// the policy that it was decided by.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    pub generation: u64,
    pub rules: Arc<RuleSet>,
    pub enforce: Enforce,
    /// What containers may set for themselves by a label.
    pub container_modes: Vec<ContainerMode>,
    /// What happens to executions that wait for a decision.
    pub deny: Deny,
    /// The name and the hash of the policy files.
    pub version: Option<String>,
    pub digest: Option<String>,
    pub files: Arc<[PolicyFile]>,
    /// What the signature of the files says, if one is needed.
    pub signed: Option<String>,
    /// Why the policy files as they are now were refused.
    pub refused: Option<String>,
    /// The paths at which a new or changed file is `file.persistence`.
    pub persistence: PathGlobs,
    /// How much rules may answer by themselves.
    pub limits: AnswerLimits,
    /// containerd's restart monitor leaves stopped what a rule kills.
    pub stop_restarts: bool,
    /// The programs that rules may run, by name.
    pub hooks: BTreeMap<String, Arc<Hook>>,
    /// How long a command that the runtime executes waits for a rhythm before it is reported:
    /// a command that comes again and again is a probe.
    pub probe_patience: SignedDuration,
}

/// What happens to an execution that rules may deny, and about which nothing can be decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deny {
    /// How long it waits for a decision.
    pub deadline: Duration,
    /// It is denied if the decision does not come in time.
    pub on_timeout: bool,
    /// It is denied while the container's baseline is not known.
    pub on_unknown: bool,
}

/// The label by which a container sets whether answers are carried out in it.
const MODE_LABEL: &str = "driftd.io/mode";

fn shared(hooks: &BTreeMap<String, Hook>) -> BTreeMap<String, Arc<Hook>> {
    hooks.iter().map(|(name, hook)| (name.clone(), Arc::new(hook.clone()))).collect()
}

/// What happens to a finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub verdict: Verdict,
    pub severity: Severity,
}

impl Policy {
    /// The policy that the settings and the policy files describe.
    pub fn of(config: &Config, loaded: Option<&Loaded>) -> Policy {
        let rules = loaded.map(|loaded| loaded.rules.rules()).unwrap_or_default();
        let kill_on = Rule::kill_on(config.respond.kill_on.iter().copied());
        let all: Vec<Rule> = rules.iter().cloned().chain(kill_on).collect();
        // The files were checked when they were read, and none of their rules has that ID.
        let rules = RuleSet::new(all).unwrap_or_default();
        Policy {
            generation: 1,
            rules: Arc::new(rules),
            enforce: config.policy.enforce,
            container_modes: config.policy.container_modes.clone(),
            deny: Deny {
                deadline: config.policy.deny_deadline,
                on_timeout: config.policy.on_timeout == OnDoubt::Deny,
                on_unknown: config.policy.on_unknown == OnDoubt::Deny,
            },
            version: loaded.and_then(|loaded| loaded.version.clone()),
            digest: loaded.and_then(|loaded| loaded.digest.clone()),
            files: loaded.map(|loaded| Arc::clone(&loaded.files)).unwrap_or_default(),
            signed: loaded.and_then(|loaded| loaded.signed.clone()),
            refused: None,
            persistence: config.watch.persistence.clone(),
            limits: AnswerLimits::of(&config.respond),
            stop_restarts: config.respond.stop_restarts,
            hooks: shared(&config.hooks),
            probe_patience: config.watch.probe_patience.try_into().unwrap_or_default(),
        }
    }

    /// A policy with the setting `respond.kill_on` alone.
    #[cfg(test)]
    pub fn killing(kinds: &[Kind]) -> Policy {
        let kill_on = kinds.iter().copied().collect();
        let respond = crate::config::Respond { kill_on, ..crate::config::Respond::default() };
        Policy::of(&Config { respond, ..Config::default() }, None)
    }

    /// Whether a finding may have another decision than to be reported as it is.
    pub fn has_rules(&self) -> bool {
        !self.rules.is_empty()
    }

    /// Whether an answer to findings of this kind may be carried out.
    pub fn may_answer(&self, kind: Kind, now: Timestamp) -> bool {
        self.rules.may_answer(kind, now)
    }

    /// The decision about a finding that no rule is for.
    pub fn report(&self) -> Verdict {
        Verdict {
            disposition: Disposition::Report,
            action: None,
            rule: None,
            policy_generation: self.generation,
            rules: Vec::new(),
            dry_run: false,
            unchanged_severity: None,
            answers: Vec::new(),
        }
    }

    /// The policy that these rules alone would be, with all answers carried out.
    pub fn rehearsed(loaded: &Loaded) -> Policy {
        Policy { enforce: Enforce::On, ..Policy::of(&Config::default(), Some(loaded)) }
    }

    /// Whether a rule may deny an execution in the container of this finding.
    pub fn may_deny(&self, in_container: &Finding, now: Timestamp) -> bool {
        let severity = in_container.severity;
        let finding = in_container;
        let subject = Subject {
            finding,
            severity,
            session: None,
            may_be_of_session: false,
            is_unproven: false,
        };
        let mut rules = self.rules.may_deny(&subject, now);
        rules.any(|rule| self.enforcement(rule.enforce, in_container) == Enforce::On)
    }

    /// Whether an answer in the container of a finding is carried out. The settings of the node
    /// can switch all off, and a container can be set to report only.
    fn enforcement(&self, of_rule: Option<Enforce>, finding: &Finding) -> Enforce {
        if self.enforce == Enforce::Off {
            return Enforce::Off;
        }
        let label = || finding.container.as_ref()?.labels.get(MODE_LABEL);
        let mode = self.container_modes.iter().find(|mode| {
            // Without the setting, labels are not looked at.
            label().is_some_and(|label| label == mode.name())
        });
        match mode {
            Some(ContainerMode::Report) => of_rule.unwrap_or(self.enforce).min(Enforce::DryRun),
            Some(ContainerMode::Enforce) => of_rule.unwrap_or(Enforce::On),
            None => of_rule.unwrap_or(self.enforce),
        }
    }

    pub fn decide(&self, subject: &Subject<'_>, now: Timestamp) -> Decision {
        let matched = self.rules.decide(subject, now);
        let text = |id: &Arc<str>| id.to_string();
        let severity =
            matched.severity.as_ref().map_or(subject.severity, |(severity, _)| *severity);
        let mut verdict = self.report();
        verdict.rules = matched.rules.iter().map(text).collect();
        verdict.rule = matched.severity.as_ref().map(|(_, rule)| text(rule));
        verdict.unchanged_severity = matched.severity.is_some().then_some(subject.severity);
        if let Some(rule) = &matched.accepted_by {
            verdict.disposition = Disposition::Accept;
            verdict.rule = Some(text(rule));
        }
        let answers = matched.answers.iter().filter_map(|(action, asked)| {
            let enforce = match asked.always_enforced {
                true => Enforce::On,
                false => self.enforcement(asked.enforce, subject.finding),
            };
            let dry_run = enforce == Enforce::DryRun;
            let (action, hook) = (*action, asked.hook.as_ref().map(text));
            let answer = RuleAnswer { action, rule: text(&asked.rule), dry_run, hook };
            (enforce != Enforce::Off).then_some(answer)
        });
        verdict.answers = answers.collect();
        // A process is ended before its container is frozen, and that before it is ended.
        verdict.answers.sort_by_key(|answer| answer.action);
        let is_real = |answer: &&RuleAnswer| !answer.dry_run;
        // One that is carried out counts before one that is not.
        let strongest = verdict.answers.iter().rfind(is_real).or(verdict.answers.last());
        // Named is the first rule that asks for it.
        let strongest = strongest.and_then(|one| {
            let is_it =
                |other: &&RuleAnswer| (other.action, other.dry_run) == (one.action, one.dry_run);
            verdict.answers.iter().find(is_it)
        });
        if let Some(RuleAnswer { action, rule, dry_run, .. }) = strongest.cloned() {
            verdict.action = Some(action.name().to_owned());
            verdict.rule = Some(rule);
            verdict.dry_run = dry_run;
            if !dry_run {
                verdict.disposition = action.disposition();
            }
        }
        Decision { verdict, severity }
    }
}
