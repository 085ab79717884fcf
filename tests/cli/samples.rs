//! Records and images for the tests to store.

use driftd::baseline::proof::LayerProof;
use driftd::baseline::{FileEntry, ImageName, KnownBy, LayerEntry, Store};
use driftd::model::{
    ChainId, ContainerId, DiffId, Exit, FileType, Finding, Format, LayerId, ManifestDigest, Probe,
    RootfsPath, Session, SessionState,
};
use driftd::{baseline, model};
use jiff::{Timestamp, ToSpan as _};

pub(crate) fn regular(path: &str, content: &str, mode: u32) -> LayerEntry {
    let path = RootfsPath::new(path).unwrap();
    LayerEntry::File(FileEntry {
        file_type: FileType::Regular,
        format: Format::sniff(content.as_bytes()),
        size: content.len() as u64,
        blake3: Some(baseline::blake3_of(content)),
        ..FileEntry::directory(path, mode)
    })
}

pub(crate) fn directory(path: &str) -> LayerEntry {
    LayerEntry::File(FileEntry::directory(RootfsPath::new(path).unwrap(), 0o755))
}

/// Records an image of one layer in namespace `default`. All but `bare:1` are known by
/// their blobs.
pub(crate) fn image(store: &Store, number: u8, name: &str, entries: Vec<LayerEntry>) {
    let diff_id = DiffId([number; 32]);
    let id = LayerId::Diff(diff_id);
    let chain_id = ChainId::of_layers(&[diff_id])[0];
    let layer = store.write_layer(id, entries).unwrap();
    store
        .write_proof(
            id,
            LayerProof {
                known_by: match name {
                    "bare:1" => KnownBy::Snapshot,
                    _ => KnownBy::Verified,
                },
                verified_at: Some("2026-11-22T01:00:00Z".parse().unwrap()),
                ..LayerProof::new(layer.checksum(), chain_id)
            },
        )
        .unwrap();
    let name = ImageName {
        namespace: "default".into(),
        name: name.into(),
        manifest_digest: Some(ManifestDigest([number; 32])),
    };
    store.write_image(chain_id, vec![id], Some(&name)).unwrap();
}

/// Two images of one shop.
pub(crate) fn shops(store: &Store) {
    let link = |target: &str| {
        LayerEntry::File(FileEntry {
            file_type: FileType::Symlink,
            size: target.len() as u64,
            link_target: Some(target.as_bytes().into()),
            ..FileEntry::directory(RootfsPath::new("/bin/lnk").unwrap(), 0o777)
        })
    };
    let common = || vec![directory("/"), directory("/bin")];
    let first = [
        regular("/bin/ls", "ls", 0o755),
        regular("/bin/old", "old", 0o755),
        regular("/bin/sh", "sh", 0o755),
        link("sh"),
    ];
    image(store, 1, "shop:1", [common(), first.into()].concat());
    let second = [
        regular("/bin/ls", "ls", 0o4755),
        regular("/bin/new\u{1b}[2J", "new", 0o755),
        regular("/bin/sh", "other", 0o755),
        link("ls"),
    ];
    image(store, 2, "shop:2", [common(), second.into()].concat());
}

pub(crate) fn sample() -> Finding {
    serde_json::from_str(include_str!("../data/finding.json")).unwrap()
}

/// A finding in the container `default/web`, last seen `ago` seconds ago.
pub(crate) fn finding(number: u8, ago: i64) -> Finding {
    let mut finding = sample();
    finding.id.0[0] = number;
    finding.container.as_mut().unwrap().id = ContainerId::new("default", "web");
    finding.last_seen = Timestamp::now() - ago.seconds();
    finding.first_seen = finding.last_seen;
    finding
}

/// An open session in the container `default/web` that began `ago` seconds ago.
pub(crate) fn session(number: u8, ago: i64) -> Session {
    let mut session: Session = serde_json::from_str(include_str!("../data/session.json")).unwrap();
    session.id.0[0] = number;
    session.container.id = ContainerId::new("default", "web");
    session.started_at = Timestamp::now() - ago.seconds();
    (session.revision, session.state) = (1, SessionState::Open);
    (session.ended_at, session.exit) = (None, None);
    session
}

pub(crate) fn closed(session: &Session, ago: i64) -> Session {
    let mut session = session.clone();
    (session.revision, session.state) = (session.revision + 1, SessionState::Closed);
    session.ended_at = Some(Timestamp::now() - ago.seconds());
    session.exit = Some(Exit { code: Some(0), signal: None });
    session
}

/// A command of a session that began `ago` seconds ago and took one second.
pub(crate) fn command(session: &Session, number: u64, argv: &[&str], ago: i64) -> model::Command {
    let mut command: model::Command =
        serde_json::from_str(include_str!("../data/command.json")).unwrap();
    (command.session, command.number) = (session.id, number);
    command.argv = Some(argv.iter().copied().map(str::to_owned).collect());
    command.started_at = Timestamp::now() - ago.seconds();
    command.ended_at = Some(command.started_at + 1.seconds());
    command.exit = Some(Exit { code: Some(0), signal: None });
    command
}

pub(crate) fn probe() -> Probe {
    let mut probe: Probe = serde_json::from_str(include_str!("../data/probe.json")).unwrap();
    probe.container.id = ContainerId::new("default", "web");
    probe.last_seen = Timestamp::now() - 5.seconds();
    probe
}
