//! The text of rules: what may stand in a policy file.
//!
//! Owns the keys and their types, and the schema that editors use. What the values mean is
//! checked in `rule` and `condition`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;
use toml::Spanned;

/// One policy file.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "A policy file of driftd")]
pub(super) struct FileText {
    /// A name for this state of the rules. `driftd status` and findings show it.
    pub(super) version: Option<String>,
    /// What the file is for. A profile needs it.
    pub(super) about: Option<String>,
    #[serde(default)]
    #[schemars(with = "Vec<RuleText>")]
    pub(super) rule: Vec<Spanned<RuleText>>,
}

/// One rule. It applies to a finding that meets all conditions of `match`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RuleText {
    /// Unique and stable, because findings name it: letters, digits, `.`, `_` and `-`.
    pub(super) id: String,
    /// Why the rule is there, for the next person who reads it.
    pub(super) reason: String,
    /// The team that answers for the rule.
    pub(super) owner: Option<String>,
    /// From when on the rule no longer applies: a date (its first second in UTC), a time with
    /// an offset, or `"never"`. An exception needs it.
    #[schemars(with = "Option<String>")]
    pub(super) expires: Option<toml::Value>,
    pub(super) effect: EffectText,
    /// The severity that findings get, with `effect = "severity"`.
    #[schemars(with = "Option<SeverityText>")]
    pub(super) severity: Option<String>,
    /// What is done about it. Not with `effect = "accept"`.
    #[serde(default)]
    pub(super) answer: Vec<AnswerText>,
    /// The hook of the settings that `answer = ["hook"]` runs.
    pub(super) hook: Option<String>,
    /// Whether the answers of this rule are carried out; without it, as `policy.enforce` says.
    /// With `policy.enforce = "off"`, no rule has an answer.
    pub(super) enforce: Option<EnforceText>,
    /// How to see what the rule is for. A rule of a profile needs it.
    pub(super) reproduce: Option<String>,
    /// The rule stands above exceptions: what it matches is never accepted.
    #[serde(default)]
    pub(super) pinned: bool,
    #[serde(rename = "match")]
    pub(super) conditions: MatchText,
}

/// What happens to a finding that the rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum EffectText {
    /// It is expected: it is kept and counted, and neither listed nor answered by default.
    Accept,
    /// It is reported, with this rule's answers.
    Report,
    /// It is reported with another severity.
    Severity,
}

/// What driftd does about a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum AnswerText {
    /// It takes evidence: files, processes and what is known of them. With other answers, this
    /// comes first.
    Evidence,
    /// It runs a program of the administrator: the one that `hook` names.
    Hook,
    /// The program is not executed. What has run nevertheless is killed.
    Deny,
    /// It kills the process that did it.
    KillProcess,
    /// It freezes the container.
    Pause,
    /// It kills the container.
    Kill,
}

/// Whether the answers of a rule are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum EnforceText {
    /// They are left out.
    Off,
    /// They are recorded with the finding, and not carried out.
    DryRun,
    On,
}

/// For the schema only.
#[derive(JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(dead_code, reason = "only its schema is used")]
enum SeverityText {
    Info,
    Low,
    Medium,
    High,
    Critical,
}

// Long: one field for each key of a rule.
/// The conditions of a rule. All that are given must hold. A list means any of its values.
/// What is not known of a finding meets no condition.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct MatchText {
    /// The rule is meant for every finding. Needed if no condition limits it.
    pub(super) everything: bool,
    /// Kinds of findings, or patterns such as `exec.*`.
    pub(super) kind: Vec<String>,
    /// The severity of the kind: `high`, `>=high` or `<=low`.
    pub(super) severity: Option<String>,
    /// Images: a repository, a repository with a tag, or a manifest digest (`sha256:…`). `*`
    /// stands for text without `/`.
    pub(super) image: Vec<String>,
    /// Paths in the container. `*` stands for text without `/`, `**` for any text.
    pub(super) path: Vec<String>,
    /// Contents: `blake3:` or `sha256:` and 64 hexadecimal digits.
    pub(super) content: Vec<String>,
    /// A process above the acting one.
    pub(super) ancestor: Option<ProgramText>,
    /// The process that wrote the file.
    pub(super) writer: Option<ProgramText>,
    /// The program that uses the file has written it itself: it loads the library, or executes
    /// the program. It is the image's own and unchanged, and no interpreter.
    pub(super) self_written: bool,
    /// Where the file lies: `overlay`, `volume`, `tmpfs`, `anonymous` (memory),
    /// `container` (another container) or `layer`.
    pub(super) filesystem: Vec<String>,
    /// IDs of containers.
    pub(super) container: Vec<String>,
    /// containerd's namespaces.
    pub(super) namespace: Vec<String>,
    /// Kubernetes namespaces.
    pub(super) pod_namespace: Vec<String>,
    /// Names of pods.
    pub(super) pod: Vec<String>,
    /// Labels of the container that must all be there.
    pub(super) label: BTreeMap<String, String>,
    /// Container runtimes, such as `io.containerd.runc.v2`.
    pub(super) runtime: Vec<String>,
    /// Whether it happened in a session. An exception without this key means `none`.
    pub(super) session: Option<SessionText>,
    /// How the session was opened, such as `runtime_exec`.
    pub(super) entry: Vec<String>,
    /// The user that requested the session, as `watch.requester_variables` names it.
    pub(super) requester: Vec<String>,
    /// The command line of the acting process, its arguments separated by spaces.
    pub(super) argv: Vec<String>,
    /// User IDs of the acting process, in the host's numbering.
    pub(super) user: Vec<u32>,
    /// At most this long after the container was started: `60s`, `5m`.
    pub(super) within: Option<String>,
}

/// A program that a process runs.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ProgramText {
    /// Its path, or a pattern of it.
    pub(super) path: String,
    /// The program is the image's own, and unchanged.
    #[serde(default)]
    pub(super) from_image: bool,
}

/// Whether a finding belongs to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum SessionText {
    /// It happened outside of sessions.
    None,
    /// In a session or not.
    Any,
    /// In an interactive session.
    Interactive,
}
