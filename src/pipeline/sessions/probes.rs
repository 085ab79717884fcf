//! Probes: commands that a machine runs again and again. A probe is declared by the
//! container's specification, or recognised by its rhythm (`cadence`). It is counted, and not
//! reported unless a client wants it.

use jiff::{SignedDuration, Timestamp};

use super::cadence::Rhythm;
use super::store::{Known, Live};
use crate::history::Record;
use crate::model::session::PROBE_SCHEMA;
use crate::model::{ContainerId, Kind, Probe, ProbeId, ProbeSource};
use crate::pipeline::messages::Effect;
use crate::pipeline::state::State;

/// Probes of one container.
const MAX_PROBES: usize = 256;
/// The number of further intervals for which a finding waits, if a rhythm has begun.
const INTERVALS: i32 = 2;

impl State {
    /// Until when a finding waits for a rhythm.
    pub(super) fn hold_until(&self, now: Timestamp) -> Option<Timestamp> {
        let patience = self.policy.probe_patience;
        let is_held = !self.policy.may_answer(Kind::SessionExec, now) && patience.is_positive();
        is_held.then(|| now.saturating_add(patience).ok()).flatten()
    }

    /// Decides whether a command is a probe, may turn out to be one, or is none.
    pub(super) fn classify(
        &mut self,
        container: &ContainerId,
        live: &mut Live,
        argv: &[String],
        at: Timestamp,
        now: Timestamp,
    ) {
        let declared = self
            .inventory
            .get(container)
            .and_then(|entry| entry.container.as_ref())
            .and_then(|record| record.probes.iter().find(|probe| probe.argv == argv))
            .map(|probe| probe.source);
        let hold = self.hold_until(now);
        let id = ProbeId::new(container, argv);
        let known = self.sessions.known(container);
        let is_full = known.probes.len() >= MAX_PROBES;
        if let Some(probe) = known.probes.get_mut(&id) {
            probe.count += 1;
            probe.last_seen = probe.last_seen.max(at);
            live.probe = (!probe.reported).then_some(id);
        } else if let Some(source) = declared.filter(|_| !is_full) {
            known.probes.insert(id, new_probe(live, id, argv, source));
            live.probe = Some(id);
        } else if let Some(hold) = hold {
            self.wait_for_rhythm(container, live, argv, at, now, hold);
        }
        if live.probe.is_some() {
            self.sessions.unpublished.probes.insert((container.clone(), id));
            self.sessions.unpublished.since.get_or_insert(now);
        }
    }

    /// A command comes that may be a probe. If its rhythm shows that it is one, the probe is
    /// learned. Otherwise its finding waits, at least until `hold`.
    fn wait_for_rhythm(
        &mut self,
        container: &ContainerId,
        live: &mut Live,
        argv: &[String],
        at: Timestamp,
        now: Timestamp,
        hold: Timestamp,
    ) {
        let known = self.sessions.known(container);
        let is_full = known.probes.len() >= MAX_PROBES;
        let rhythm = known.cadences.came(argv, at);
        let until = match rhythm {
            Rhythm::Steady(interval) if !is_full => {
                return learn(known, live, argv, at, interval);
            }
            Rhythm::Perhaps(interval) => {
                let next = now.saturating_add(interval * INTERVALS);
                next.map_or(hold, |next| next.max(hold))
            }
            Rhythm::Steady(_) | Rhythm::None => hold,
        };
        live.held_until = Some(until);
        let mut waiting = vec![live.session.process.identity];
        if let Rhythm::Perhaps(_) = rhythm {
            // The sessions before it wait with it.
            for earlier in waiting_with(known, argv) {
                earlier.held_until = Some(until);
                waiting.push(earlier.session.process.identity);
            }
        }
        let held = waiting.into_iter().map(|root| (until, container.clone(), root));
        self.sessions.held.extend(held);
    }

    /// Sets whether a probe is reported all the same.
    pub(in crate::pipeline) fn set_probe(
        &mut self,
        id: ProbeId,
        reported: bool,
        effects: &mut Vec<Effect>,
    ) -> Option<Probe> {
        let all = self.sessions.containers.values_mut();
        let probe = all.into_iter().find_map(|known| known.probes.get_mut(&id))?;
        probe.reported = reported;
        let probe = probe.clone();
        effects.push(Effect::Record(Record::Probe(Box::new(probe.clone()))));
        Some(probe)
    }

    pub(super) fn publish_probe(
        &mut self,
        container: &ContainerId,
        id: ProbeId,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(probe) = self.sessions.known(container).probes.get(&id) {
            effects.push(Effect::Record(Record::Probe(Box::new(probe.clone()))));
        }
    }
}

/// The sessions whose finding waits, and that run the same command.
fn waiting_with<'a>(known: &'a mut Known, argv: &[String]) -> impl Iterator<Item = &'a mut Live> {
    known.live.values_mut().filter(move |earlier| {
        earlier.held_until.is_some() && earlier.session.process.argv.as_deref() == Some(argv)
    })
}

/// The rhythm is steady: this session and those that wait are a probe.
fn learn(
    known: &mut Known,
    live: &mut Live,
    argv: &[String],
    at: Timestamp,
    interval: SignedDuration,
) {
    known.cadences.forget(argv);
    let mut count = 1;
    for earlier in waiting_with(known, argv) {
        earlier.held_until = None;
        count += 1;
    }
    let id = ProbeId::new(&live.session.container.id, argv);
    let learned = Probe {
        interval_milliseconds: Some(u64::try_from(interval.as_millis()).unwrap_or_default()),
        count,
        first_seen: at.saturating_sub(interval * INTERVALS).unwrap_or(at),
        ..new_probe(live, id, argv, ProbeSource::Learned)
    };
    known.probes.insert(id, learned);
    live.probe = Some(id);
}

fn new_probe(live: &Live, id: ProbeId, argv: &[String], source: ProbeSource) -> Probe {
    let session = &live.session;
    Probe {
        schema: PROBE_SCHEMA.to_owned(),
        id,
        container: session.container.clone(),
        image: session.image.clone(),
        argv: argv.to_vec(),
        source,
        interval_milliseconds: None,
        count: 1,
        first_seen: session.started_at,
        last_seen: session.started_at,
        reported: false,
    }
}
