//! How much rules may answer by themselves, as the settings say. The pipeline counts.

use std::time::Duration;

use crate::config::Respond;

/// How much rules may answer by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnswerLimits {
    /// In how many containers one rule may answer.
    pub containers_of_rule: usize,
    /// How often one container, the containers of one image, and all together may be killed or
    /// paused.
    pub of_container: usize,
    pub of_image: usize,
    pub of_node: usize,
    /// The time to which these limits apply.
    pub within: Duration,
}

impl AnswerLimits {
    pub(super) fn of(settings: &Respond) -> AnswerLimits {
        let number = |count: u32| usize::try_from(count).unwrap_or(usize::MAX);
        AnswerLimits {
            containers_of_rule: number(settings.max_containers_of_rule),
            of_container: number(settings.max_of_container),
            of_image: number(settings.max_of_image),
            of_node: number(settings.max_of_node),
            within: settings.within,
        }
    }
}

impl Default for AnswerLimits {
    fn default() -> AnswerLimits {
        AnswerLimits::of(&Respond::default())
    }
}
