//! The rules in force, as clients see them.

use jiff::{SignedDuration, Timestamp};

use super::value::{count, time_to_proto};
use crate::api::proto;
use crate::history::RuleHits;
use crate::policy::{Effect, Policy, PolicyFile, Rule};

/// How long before and after its end a rule is named by the status.
const AROUND_END: SignedDuration = SignedDuration::from_hours(7 * 24);

pub fn policy_status_to_proto(policy: &Policy, now: Timestamp) -> proto::PolicyStatus {
    let ends = policy.rules.rules().iter().filter_map(|rule| {
        let end = rule.expires?;
        (end.duration_since(now).abs() <= AROUND_END).then(|| proto::RuleEnd {
            id: rule.id.to_string(),
            expires: Some(time_to_proto(end)),
            expired: rule.is_expired(now),
        })
    });
    proto::PolicyStatus {
        generation: policy.generation,
        version: policy.version.clone(),
        digest: policy.digest.clone(),
        enforce: policy.enforce.name().into(),
        rules: count(policy.rules.rules().len()),
        refused: policy.refused.clone(),
        ends: ends.collect(),
        profiles: profiles(policy, false),
        signed: policy.signed.clone(),
        container_profiles: profiles(policy, true),
    }
}

fn profiles(policy: &Policy, by_label: bool) -> Vec<String> {
    let files = policy.files.iter().filter(|file| file.by_label == by_label);
    files.filter_map(|file| file.profile.clone()).collect()
}

/// `hits`: how often the rule has matched.
pub fn rule_to_proto(rule: &Rule, hits: Option<&RuleHits>, now: Timestamp) -> proto::PolicyRule {
    let (effect, severity) = match rule.effect {
        Effect::Accept => ("accept", None),
        Effect::Report => ("report", None),
        Effect::Severity(severity) => ("severity", Some(severity.name().to_owned())),
    };
    proto::PolicyRule {
        id: rule.id.to_string(),
        reason: rule.reason.clone(),
        owner: rule.owner.clone(),
        expires: rule.expires.map(time_to_proto),
        expired: rule.is_expired(now),
        effect: effect.into(),
        severity,
        answers: rule.answers.iter().map(|answer| answer.name().to_owned()).collect(),
        hook: rule.hook.as_deref().map(ToOwned::to_owned),
        pinned: rule.pinned,
        file: rule.place.file.to_string(),
        line: count(rule.place.line),
        hits: hits.map_or(0, |hits| hits.hits),
        last_hit: hits.map(|hits| time_to_proto(hits.last)),
    }
}

pub fn policy_file_to_proto(file: &PolicyFile) -> proto::PolicyFile {
    let PolicyFile { name, text, profile, by_label } = file.clone();
    proto::PolicyFile { name, text, profile, by_label }
}

pub fn policy_file_from_proto(file: proto::PolicyFile) -> PolicyFile {
    let proto::PolicyFile { name, text, profile, by_label } = file;
    PolicyFile { name, text, profile, by_label }
}
