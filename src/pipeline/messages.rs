//! What goes into the loop, and what comes out of it: `State` reacts to an `Input` with any
//! number of `Effect`s. `run` makes the inputs from its channels, and carries the effects out.

use std::collections::HashSet;

use super::gaps::Gap;
use super::requests::ApiRequest;
use crate::baseline::{BaselineEvent, Proof, RecordRequest};
use crate::containerd::RuntimeEvent;
use crate::history::Record;
use crate::model::{ChainId, Container, Finding, ImageReference};
use crate::respond::{Response, ResponseRequest};
use crate::watch::{Decision, Question, SensorCommand, SensorEvent};

/// Everything that can make the loop do something. The list is closed: this enum shows all
/// that driftd reacts to.
#[derive(Debug)]
pub enum Input {
    Runtime(RuntimeEvent),
    /// With an image that contains the layer, if the event is about a tampered layer and
    /// such an image is known.
    Baseline(BaselineEvent, ImageReference),
    Sensor(SensorEvent),
    /// An execution waits for a decision.
    Question(Box<Question>),
    Request(ApiRequest),
    Response(Response),
    /// The history begins anew: it needs everything that is known.
    HistoryBegun,
    /// The time of `State::next_due` has come.
    Due,
}

/// Everything that the loop can make others do.
#[derive(Debug)]
pub enum Effect {
    Command(SensorCommand),
    RecordBaseline(RecordRequest),
    /// Forget the baselines that neither an image nor one of these chains needs.
    CollectBaselines(HashSet<ChainId>),
    Record(Record),
    Respond(ResponseRequest),
    /// Answers an execution that waits under this number.
    Decide {
        number: u64,
        decision: Decision,
    },
}

impl Effect {
    /// Records the newest revision of a finding.
    pub(super) fn finding(finding: &Finding) -> Effect {
        Effect::Record(Record::Finding(Box::new(finding.clone())))
    }

    pub(super) fn gap(gap: Gap) -> Effect {
        Effect::Record(gap.into_record())
    }

    /// Requests the baseline of a container's image.
    pub(super) fn record_baseline(container: &Container) -> Effect {
        Effect::RecordBaseline(RecordRequest {
            image: None,
            container: Some(container.id.clone()),
            layers: container.layers.clone(),
            proof: Proof::Later,
            progress: None,
            done: None,
        })
    }
}
