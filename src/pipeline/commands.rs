//! Commands to the sensors that follow from what is known of a container: how far its lower
//! files are trusted, what starts it, and how its files were judged. Commands that an event or
//! a client causes are made where that is handled (`node`, `serve`).

use super::messages::Effect;
use crate::inventory::{BaselineState, Entry};
use crate::model::{ContainerId, Fact, FileFact, Observation};
use crate::watch::{SensorCommand, Trust, Verdict};

/// How far a container's lower files are trusted. The layers were compared in the directories
/// of a snapshotter: this means nothing for a container whose files are in no directory.
pub(super) fn trust(entry: &Entry) -> Trust {
    let has_directories = entry
        .container
        .as_ref()
        .is_some_and(|container| container.layers.iter().all(|layer| layer.directory.is_some()));
    match &entry.baseline.state {
        BaselineState::Ready(_) => entry
            .baseline
            .unchanged_since
            .filter(|_| has_directories)
            .map_or(Trust::Unknown, Trust::UpTo),
        BaselineState::Unknown | BaselineState::Pending(_) => Trust::Unknown,
        BaselineState::Failed(..) | BaselineState::None(_) => Trust::NoBaseline,
    }
}

/// Sends how far to trust the container's lower files, if the sensors watch it.
pub(super) fn send_trust(id: &ContainerId, entry: &Entry, effects: &mut Vec<Effect>) {
    if entry.watch.takes_commands() {
        let (container, trust) = (id.clone(), trust(entry));
        effects.push(Effect::Command(SensorCommand::Trust { container, trust }));
    }
}

/// Sends what starts the container, if the sensors watch it.
pub(super) fn send_entry_point(id: &ContainerId, entry: &Entry, effects: &mut Vec<Effect>) {
    if entry.watch.takes_commands() && !entry.baseline.entry_point.is_empty() {
        let (container, paths) = (id.clone(), entry.baseline.entry_point.clone());
        effects.push(Effect::Command(SensorCommand::EntryPoint { container, paths }));
    }
}

/// Sends how an executed file of the layers was judged.
pub(super) fn send_verdict(observation: &Observation, verdict: Verdict, effects: &mut Vec<Effect>) {
    if let Fact::File(FileFact::Executed { layer_file: Some(file), .. }) = &observation.fact {
        let (container, file) = (observation.container.clone(), *file);
        effects.push(Effect::Command(SensorCommand::Judged { container, file, verdict }));
    }
}

/// Requests a scan of the container, without a client that waits for its end.
pub(super) fn scan(container: ContainerId) -> Effect {
    Effect::Command(SensorCommand::Scan { container, ticket: None })
}
