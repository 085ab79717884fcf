//! `driftd probes`: lists the commands that run again and again, and sets which are reported.
//!
//! Owns the columns of a probe. Listing talks to the daemon or to a history, setting to the
//! daemon only.

use super::client::{Client, Server, call};
use super::describe::{pod, quoted};
use super::exit::Exit;
use super::output::{Field, Listed, Listing, Output, Style, age, list, one, safe, time};
use super::pages::OfContainer;
use crate::api::{convert, proto};
use crate::model::{Probe, ProbeSource};

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Probes {
    #[command(subcommand)]
    change: Option<Change>,
    #[command(flatten)]
    container: OfContainer,
    #[command(flatten)]
    listing: Listing,
}

#[derive(Debug, clap::Subcommand)]
enum Change {
    /// Report a probe again, each time that it runs
    Report(Target),
    /// Only count a probe, as before it was reported
    Count(Target),
}

#[derive(Debug, clap::Args)]
struct Target {
    /// A probe's ID, or the beginning of it
    probe: String,
    #[command(flatten)]
    output: Output,
}

impl Probes {
    pub(super) fn is_change(&self) -> bool {
        self.change.is_some()
    }

    pub(super) fn run(self, server: Server<'_>) -> anyhow::Result<Exit> {
        match self.change {
            Some(Change::Report(target)) => return set(server, target, true),
            Some(Change::Count(target)) => return set(server, target, false),
            None => (),
        }
        let request = proto::ListProbesRequest { container: self.container.to_proto() };
        let probes = call(server, request, Client::list_probes)?.probes;
        let probes: Vec<Probe> =
            probes.into_iter().map(convert::probe_from_proto).collect::<Result<_, _>>()?;
        list(&probes, &self.listing)?;
        self.listing.note_if_empty(probes.len(), "no probe is known");
        Ok(Exit::Clean)
    }
}

fn set(server: Server<'_>, target: Target, reported: bool) -> anyhow::Result<Exit> {
    let request = proto::SetProbeRequest { probe: target.probe, reported };
    let probe = call(server, request, Client::set_probe)?.probe;
    let probe = probe.ok_or_else(|| anyhow::anyhow!("driftd returned no probe"))?;
    let probe = convert::probe_from_proto(probe)?;
    one(&probe, target.output.format, || text(&probe))?;
    Ok(Exit::Clean)
}

fn text(probe: &Probe) -> String {
    let what = if probe.reported { "reported" } else { "counted and not reported" };
    format!(
        "{} is {what} from now on: {} in {}\n",
        probe.id,
        quoted(&probe.argv),
        probe.container.id
    )
}

/// The time between two runs.
fn rhythm(milliseconds: u64) -> String {
    match milliseconds {
        0..1000 => format!("{milliseconds}ms"),
        1000..120_000 if milliseconds.is_multiple_of(1000) => format!("{}s", milliseconds / 1000),
        1000..120_000 => format!("{}.{}s", milliseconds / 1000, milliseconds % 1000 / 100),
        _ => format!("{}m", milliseconds / 60_000),
    }
}

fn source(source: ProbeSource) -> &'static str {
    match source {
        ProbeSource::Healthcheck => "health check",
        ProbeSource::LifecycleHook => "lifecycle hook",
        ProbeSource::Learned => "its rhythm",
    }
}

impl Listed for Probe {
    type Json<'a> = &'a Probe;

    fn json(&self) -> &Probe {
        self
    }

    fn name(&self) -> String {
        self.id.to_string()
    }

    fn header(wide: bool) -> Vec<&'static str> {
        let mut header =
            vec!["CONTAINER", "COMMAND", "KNOWN BY", "COUNT", "EVERY", "LAST SEEN", "STATE"];
        if wide {
            header.extend(["POD", "IMAGE", "FIRST SEEN"]);
        }
        header.push("ID");
        header
    }

    fn row(&self, style: &Style) -> Vec<Field> {
        let mut row: Vec<Field> = vec![
            style.id(&self.container.id.id).into(),
            quoted(&self.argv).into(),
            source(self.source).into(),
            self.count.to_string().into(),
            self.interval_milliseconds.map(rhythm).unwrap_or_default().into(),
            age(style.now, self.last_seen).into(),
            if self.reported { "reported" } else { "counted" }.into(),
        ];
        if style.wide {
            row.extend([
                Field::from(pod(self.container.pod.as_ref())),
                safe(self.image.name.as_deref().unwrap_or_default()).into(),
                time(self.first_seen).into(),
            ]);
        }
        row.push(style.id(&self.id.to_string()).into());
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::output::table;
    use crate::cli::sessions::tests::assert_clean;

    #[test]
    fn probes_as_people_see_them() {
        let sample: Probe =
            serde_json::from_str(include_str!("../../tests/data/probe.json")).unwrap();
        let mut hostile = sample.clone();
        hostile.id = "00000000000000000000000000000001".parse().unwrap();
        hostile.argv = vec!["\u{1b}[2J".into(), "a b".into()];
        hostile.source = ProbeSource::Healthcheck;
        (hostile.interval_milliseconds, hostile.reported) = (None, true);
        let probes = [sample, hostile];
        let style = |wide| Style {
            wide,
            no_trunc: false,
            colour: false,
            width: None,
            now: "2026-11-20T10:08:30Z".parse().unwrap(),
        };
        insta::assert_snapshot!(table(&probes, &style(false)));
        insta::assert_snapshot!(table(&probes, &style(true)));
        let texts = probes.each_ref().map(text).concat();
        assert_clean(&texts);
        insta::assert_snapshot!(texts);
    }

    #[test]
    fn a_rhythm_is_written_in_one_unit() {
        for (milliseconds, expected) in
            [(500, "500ms"), (1500, "1.5s"), (10_000, "10s"), (90_000, "90s"), (600_000, "10m")]
        {
            assert_eq!(rhythm(milliseconds), expected);
        }
    }
}
