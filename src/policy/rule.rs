//! One rule, checked: its effect, its end, its answers and its conditions.

use std::sync::Arc;

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

use super::condition::{Condition, conditions};
use super::text::{AnswerText, EffectText, EnforceText, MatchText, RuleText, SessionText};
use crate::config::Enforce;
use crate::model::{Answer, Kind, Severity};

/// The longest ID of a rule, and the longest reason.
const MAX_ID: usize = 64;
const MAX_TEXT: usize = 1024;

/// What happens to a finding that a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    Accept,
    Report,
    Severity(Severity),
}

/// Where a rule is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub file: Arc<str>,
    pub line: usize,
}

#[derive(Clone, Debug)]
pub struct Rule {
    pub id: Arc<str>,
    pub reason: String,
    pub owner: Option<String>,
    /// From when on it does not apply; `None`: never.
    pub expires: Option<Timestamp>,
    pub effect: Effect,
    pub answers: Vec<Answer>,
    /// The hook that it runs, with `answer = ["hook"]`.
    pub hook: Option<Arc<str>>,
    pub pinned: bool,
    /// Its answers are carried out whatever `policy.enforce` says.
    pub always_enforced: bool,
    /// Whether they are carried out, if that is not for `policy.enforce` to say.
    pub enforce: Option<Enforce>,
    pub place: Place,
    pub(super) conditions: Vec<Condition>,
}

impl Rule {
    /// Checks a rule, perhaps one of a profile. The error says which key is wrong, and why.
    pub(super) fn new(text: RuleText, place: Place, profile: Option<&str>) -> Result<Rule, String> {
        if let Some(profile) = profile {
            check_of_profile(&text, profile)?;
        }
        let RuleText {
            id,
            reason,
            owner,
            expires,
            effect,
            severity,
            answer,
            hook,
            pinned,
            enforce,
            reproduce,
            conditions: of,
        } = text;
        check_id(&id)?;
        check_text("reason", &reason)?;
        owner.as_deref().map_or(Ok(()), |owner| check_text("owner", owner))?;
        reproduce.as_deref().map_or(Ok(()), |text| check_text("reproduce", text))?;
        let effect = match (effect, severity) {
            (EffectText::Accept, None) => Effect::Accept,
            (EffectText::Report, None) => Effect::Report,
            (EffectText::Severity, Some(text)) => {
                Effect::Severity(text.parse().map_err(|err| format!("`severity`: {err}"))?)
            }
            (EffectText::Severity, None) => {
                return Err("`severity` is missing: which severity do findings get?".to_owned());
            }
            (_, Some(_)) => return Err("`severity` needs `effect = \"severity\"`".to_owned()),
        };
        let is_exception = effect == Effect::Accept;
        if is_exception && !answer.is_empty() {
            return Err("`answer` does not go with `effect = \"accept\"`".to_owned());
        }
        if is_exception && pinned {
            return Err("`pinned` is for rules that no exception overrides".to_owned());
        }
        if is_exception && enforce.is_some() {
            return Err("`enforce` is for rules with answers".to_owned());
        }
        check_hook(&answer, hook.as_deref())?;
        if answer.contains(&AnswerText::Deny) {
            check_denies(&of)?;
        }
        let expires = match expires {
            None if is_exception => {
                return Err("`expires` is missing: a date, or \"never\"".to_owned());
            }
            None => None,
            Some(value) => end(&value)?,
        };
        Ok(Rule {
            id: id.into(),
            reason,
            owner,
            expires,
            effect,
            answers: answer.into_iter().map(Answer::from).collect(),
            hook: hook.map(Into::into),
            pinned,
            always_enforced: false,
            enforce: enforce.map(|enforce| match enforce {
                EnforceText::Off => Enforce::Off,
                EnforceText::DryRun => Enforce::DryRun,
                EnforceText::On => Enforce::On,
            }),
            place,
            conditions: conditions(of, is_exception)?,
        })
    }

    /// The rule that the setting `respond.kill_on` stands for.
    pub(super) fn kill_on(kinds: impl Iterator<Item = Kind>) -> Option<Rule> {
        let kinds: Vec<Kind> = kinds.collect();
        (!kinds.is_empty()).then(|| Rule {
            id: super::KILL_ON.into(),
            reason: "the setting respond.kill_on".to_owned(),
            owner: None,
            expires: None,
            effect: Effect::Report,
            answers: vec![Answer::Kill],
            hook: None,
            pinned: false,
            always_enforced: true,
            enforce: None,
            place: Place { file: "driftd.toml".into(), line: 0 },
            conditions: vec![Condition::Kind(kinds)],
        })
    }

    /// Limits the rule to containers whose label asks for this profile, alone or among others.
    pub(super) fn asked_by_label(&mut self, profile: &str) {
        self.conditions.push(Condition::asked_by_label(profile));
    }

    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.expires.is_some_and(|end| end <= now)
    }

    pub fn is_exception(&self) -> bool {
        self.effect == Effect::Accept
    }
}

/// A hook needs its name, and a name needs the answer.
fn check_hook(answer: &[AnswerText], hook: Option<&str>) -> Result<(), String> {
    match (answer.contains(&AnswerText::Hook), hook) {
        (true, None) => {
            Err("`hook` is missing: which hook of the settings ([hooks.NAME]) runs?".to_owned())
        }
        (false, Some(_)) => Err("`hook` needs `answer = [\"hook\"]`".to_owned()),
        (true, Some(_)) | (false, None) => Ok(()),
    }
}

/// Whether a rule with these conditions can deny anything.
fn check_denies(of: &MatchText) -> Result<(), String> {
    if !of.argv.is_empty() {
        return Err(
            "`deny` does not go with `argv`: the arguments are not known before the program \
                    runs (kill-process ends it when they are)"
                .to_owned(),
        );
    }
    let kinds: Vec<Kind> =
        of.kind.iter().flat_map(|name| Kind::named_by(name).unwrap_or_default()).collect();
    if !kinds.is_empty() && !kinds.iter().any(|kind| kind.is_run()) {
        return Err("`deny` is for code that is run: `kind` names none of exec.* and \
                    library.loaded"
            .to_owned());
    }
    Ok(())
}

impl From<AnswerText> for Answer {
    fn from(text: AnswerText) -> Answer {
        match text {
            AnswerText::Evidence => Answer::Evidence,
            AnswerText::Hook => Answer::Hook,
            AnswerText::Deny => Answer::Deny,
            AnswerText::KillProcess => Answer::KillProcess,
            AnswerText::Pause => Answer::Pause,
            AnswerText::Kill => Answer::Kill,
        }
    }
}

/// What holds for the rules of a profile beside what holds for all.
fn check_of_profile(text: &RuleText, profile: &str) -> Result<(), String> {
    let prefix = format!("{profile}.");
    if !text.id.starts_with(&prefix) {
        return Err(format!("the `id` of a rule of this profile begins with `{prefix}`"));
    }
    if text.effect != EffectText::Accept {
        return Err("a profile has exceptions only".to_owned());
    }
    if text.reproduce.is_none() {
        return Err("`reproduce` is missing: how does one see what it accepts?".to_owned());
    }
    if text.conditions.session.is_some_and(|session| session != SessionText::None) {
        return Err("a profile does not accept what happened in sessions".to_owned());
    }
    Ok(())
}

fn check_id(id: &str) -> Result<(), String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if id == super::KILL_ON {
        return Err(format!("the id `{id}` stands for the setting of that name"));
    }
    if id.is_empty() || id.len() > MAX_ID || !id.bytes().all(is_plain) {
        return Err(format!(
            "`id` has 1 to {MAX_ID} letters, digits, `.`, `_` or `-`, and this has not"
        ));
    }
    Ok(())
}

fn check_text(key: &str, text: &str) -> Result<(), String> {
    if text.trim().is_empty() {
        return Err(format!("`{key}` is empty"));
    }
    if text.len() > MAX_TEXT || text.chars().any(char::is_control) {
        return Err(format!("`{key}` has more than {MAX_TEXT} bytes, or control characters"));
    }
    Ok(())
}

/// From when on a rule does not apply.
fn end(value: &toml::Value) -> Result<Option<Timestamp>, String> {
    let wrong = "`expires` is a date (2027-03-01), a time with an offset \
                 (2027-03-01T12:00:00Z), or \"never\"";
    let text = match value {
        toml::Value::String(text) if text == "never" => return Ok(None),
        toml::Value::String(text) => text.clone(),
        toml::Value::Datetime(time) => time.to_string(),
        _ => return Err(wrong.to_owned()),
    };
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(Some(time));
    }
    let date: Date = text.parse().map_err(|_| wrong.to_owned())?;
    // A text with a time of day and without an offset is read as a date, too.
    if text.len() != "2027-03-01".len() {
        return Err(wrong.to_owned());
    }
    let start = date.to_zoned(TimeZone::UTC).map_err(|_| wrong.to_owned())?;
    Ok(Some(start.timestamp()))
}
