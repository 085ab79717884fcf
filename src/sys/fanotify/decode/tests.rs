//! Events as the kernel writes them, and arbitrary bytes.

use proptest::prelude::*;

use super::*;

// Linux 6.14, and not yet in libc.
const FAN_MNT_ATTACH: u64 = 0x0100_0000;
const FAN_MNT_DETACH: u64 = 0x0200_0000;

/// An event as the kernel writes it.
fn event(mask: u64, fd: i32, pid: i32, records: &[u8]) -> Vec<u8> {
    let len = u32::try_from(METADATA_LEN + records.len()).unwrap();
    let mut bytes = len.to_ne_bytes().to_vec();
    bytes.push(libc::FANOTIFY_METADATA_VERSION);
    bytes.push(0);
    bytes.extend(u16::try_from(METADATA_LEN).unwrap().to_ne_bytes());
    bytes.extend(mask.to_ne_bytes());
    bytes.extend(fd.to_ne_bytes());
    bytes.extend(pid.to_ne_bytes());
    bytes.extend(records);
    bytes
}

fn record(info_type: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![info_type, 0];
    bytes.extend(u16::try_from(INFO_HEADER_LEN + body.len()).unwrap().to_ne_bytes());
    bytes.extend(body);
    bytes
}

fn pidfd(fd: i32) -> Vec<u8> {
    record(libc::FAN_EVENT_INFO_TYPE_PIDFD, &fd.to_ne_bytes())
}

#[track_caller]
fn check(bytes: &[u8], expected: &[Decoded<i32>]) {
    let (decoded, outcome) = decode(bytes, |fd| fd);
    assert_eq!(outcome, Ok(()));
    assert_eq!(decoded, expected);
}

#[test]
fn kinds_of_events_are_distinguished() {
    let exec = libc::FAN_OPEN_EXEC_PERM;
    let written = libc::FAN_CLOSE_WRITE;
    let mut bytes = event(exec, 7, 42, &pidfd(8));
    bytes.extend(event(written, 9, 43, &[]));
    bytes.extend(event(libc::FAN_Q_OVERFLOW, libc::FAN_NOFD, 0, &[]));
    check(
        &bytes,
        &[
            Decoded::Permission(Event {
                file: 7,
                pid: 42,
                pidfd: Some(8),
                mask: exec,
                range: None,
            }),
            Decoded::Notification(Event {
                file: 9,
                pid: 43,
                pidfd: None,
                mask: written,
                range: None,
            }),
            Decoded::Overflow,
        ],
    );
}

#[test]
fn a_process_that_is_gone_has_no_pidfd() {
    for gone in [libc::FAN_NOPIDFD, libc::FAN_EPIDFD] {
        let mask = libc::FAN_OPEN_EXEC_PERM;
        let expected = Event { file: 7, pid: 42, pidfd: None, mask, range: None };
        check(
            &event(libc::FAN_OPEN_EXEC_PERM, 7, 42, &pidfd(gone)),
            &[Decoded::Permission(expected)],
        );
    }
}

#[test]
fn unknown_records_are_skipped() {
    let mut records = record(200, b"from the future");
    records.extend(pidfd(8));
    let mask = libc::FAN_CLOSE_WRITE;
    let expected = Event { file: 7, pid: 1, pidfd: Some(8), mask, range: None };
    check(&event(libc::FAN_CLOSE_WRITE, 7, 1, &records), &[Decoded::Notification(expected)]);
}

#[test]
fn an_event_before_a_read_has_the_part_that_is_read() {
    let mut body = vec![0; 4];
    body.extend(4096_u64.to_ne_bytes());
    body.extend(8192_u64.to_ne_bytes());
    let range = Some(Range { offset: 4096, length: 8192 });
    let expected = |range| {
        let mask = FAN_PRE_ACCESS;
        [Decoded::Permission(Event { file: 7, pid: 42, pidfd: None, mask, range })]
    };
    let ranged = record(FAN_EVENT_INFO_TYPE_RANGE, &body);
    check(&event(FAN_PRE_ACCESS, 7, 42, &ranged), &expected(range));
    // Too short: nothing is known of the part.
    let short = record(FAN_EVENT_INFO_TYPE_RANGE, &body[..12]);
    check(&event(FAN_PRE_ACCESS, 7, 42, &short), &expected(None));
}

#[test]
fn a_name_in_a_record_is_never_taken_for_a_descriptor() {
    // What makes fanotify-rs close descriptors of the process.
    let name = record(2, b"\x01\0\0\0me-0 \x01\0\0\0");
    let (decoded, outcome) =
        decode(&event(libc::FAN_CREATE, libc::FAN_NOFD, 1, &name), |fd| -> () {
            panic!("{fd} is no descriptor")
        });
    assert_eq!((decoded.len(), outcome), (1, Ok(())));
}

#[test]
fn a_truncated_event_is_refused_and_those_before_it_are_kept() {
    let mut bytes = event(libc::FAN_CLOSE_WRITE, 7, 1, &[]);
    bytes.extend(&event(libc::FAN_CLOSE_WRITE, 8, 1, &[])[..20]);
    let (decoded, outcome) = decode(&bytes, |fd| fd);
    assert_eq!(decoded.len(), 1);
    assert_eq!(outcome, Err(Malformed::Length { event_len: 24, left: 20 }));
}

#[test]
fn another_version_is_refused() {
    let mut bytes = event(libc::FAN_CLOSE_WRITE, 7, 1, &[]);
    bytes[offset_of!(Metadata, vers)] = 4;
    let (decoded, outcome) = decode(&bytes, |fd| -> () { panic!("{fd} was trusted") });
    assert_eq!((decoded, outcome), (vec![], Err(Malformed::Version(4))));
}

/// A record of a directory and a name in it, as the kernel writes it.
fn named(filesystem: u64, kind: u32, handle: &[u8], name: &[u8]) -> Vec<u8> {
    let halves = [filesystem & u64::from(u32::MAX), filesystem >> 32];
    let mut body: Vec<u8> =
        halves.iter().flat_map(|half| u32::try_from(*half).unwrap().to_ne_bytes()).collect();
    body.extend(u32::try_from(handle.len()).unwrap().to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(handle);
    body.extend(name);
    body.extend(vec![0; 4 - name.len() % 4]);
    record(libc::FAN_EVENT_INFO_TYPE_DFID_NAME, &body)
}

#[test]
fn names_come_with_their_directory() {
    let created = libc::FAN_CREATE;
    let records = [pidfd(8), named(1 << 40, 1, b"12345678", b"a\xff\n")].concat();
    let mut bytes = event(created, libc::FAN_NOFD, 42, &records);
    bytes.extend(event(libc::FAN_Q_OVERFLOW, libc::FAN_NOFD, 0, &[]));
    bytes.extend(event(created, libc::FAN_NOFD, 42, &[]));
    let (decoded, outcome) = decode_names(&bytes);
    assert_eq!(outcome, Ok(()));
    assert_eq!(
        decoded,
        [
            DecodedName::Named(Named {
                mask: created,
                pid: 42,
                directory: FileHandle::new(1 << 40, 1, b"12345678"),
                name: (*b"a\xff\n").into(),
            }),
            DecodedName::Overflow,
            DecodedName::Nameless { mask: created },
        ]
    );
}

#[test]
fn a_changed_mount_is_known_by_its_unique_id() {
    let mount =
        |id: u64| record(FAN_EVENT_INFO_TYPE_MNT, &[&[0; 4][..], &id.to_ne_bytes()].concat());
    let moved = FAN_MNT_ATTACH | FAN_MNT_DETACH;
    let mut bytes = event(moved, libc::FAN_NOFD, 0, &mount(1 << 40));
    bytes.extend(event(libc::FAN_Q_OVERFLOW, libc::FAN_NOFD, 0, &[]));
    bytes.extend(event(FAN_MNT_ATTACH, libc::FAN_NOFD, 0, &mount(7)[..12]));
    let expected = [DecodedMount::Changed(1 << 40), DecodedMount::Unnamed, DecodedMount::Unnamed];
    assert_eq!(decode_mounts(&bytes), (expected.to_vec(), Ok(())));
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_or_refused(bytes: Vec<u8>) {
        let _ = decode(&bytes, |fd| fd);
        let _ = decode_names(&bytes);
        let _ = decode_mounts(&bytes);
    }

    #[test]
    fn nearly_valid_names_are_decoded_or_refused(
        mask: u64, filesystem: u64, kind: u32, handle: Vec<u8>, name: Vec<u8>,
        at in 0usize..96, byte: u8,
    ) {
        let mut bytes = event(mask, -1, 1, &named(filesystem, kind, &handle, &name));
        if let Some(place) = bytes.get_mut(at) {
            *place = byte;
        }
        let (decoded, _) = decode_names(&bytes);
        prop_assert!(decoded.len() <= 1);
    }

    #[test]
    fn every_name_is_reported_once(
        names in prop::collection::vec((any::<u64>(), any::<u32>(), any::<[u8; 8]>(), "[a-z.]{1,20}"), 0..50),
    ) {
        let mut bytes = Vec::new();
        for (filesystem, kind, handle, name) in &names {
            let records = named(*filesystem, *kind, handle, name.as_bytes());
            bytes.extend(event(libc::FAN_ATTRIB, -1, 1, &records));
        }
        let expected: Vec<DecodedName> = names
            .iter()
            .map(|(filesystem, kind, handle, name)| DecodedName::Named(Named {
                mask: libc::FAN_ATTRIB,
                pid: 1,
                directory: FileHandle::new(*filesystem, *kind, handle),
                name: name.as_bytes().into(),
            }))
            .collect();
        prop_assert_eq!(decode_names(&bytes), (expected, Ok(())));
    }

    #[test]
    fn nearly_valid_events_are_decoded_or_refused(
        mask: u64, fd: i32, pid: i32, records: Vec<u8>, at in 0usize..64, byte: u8,
    ) {
        let mut bytes = event(mask, fd, pid, &records);
        if let Some(place) = bytes.get_mut(at) {
            *place = byte;
        }
        let mut taken = Vec::new();
        let (decoded, _) = decode(&bytes, |fd| taken.push(fd));
        prop_assert!(taken.iter().all(|fd| *fd >= 0));
        prop_assert!(decoded.len() <= 1 && taken.len() <= 2);
    }

    #[test]
    fn every_descriptor_is_taken_once(events in prop::collection::vec((0i32..1000, prop::option::of(0i32..1000)), 0..50)) {
        let mut bytes = Vec::new();
        let mut expected = Vec::new();
        for (fd, pid_fd) in &events {
            bytes.extend(event(libc::FAN_OPEN_EXEC_PERM, *fd, 1, &pid_fd.map(pidfd).unwrap_or_default()));
            expected.push(*fd);
            expected.extend(*pid_fd);
        }
        let mut taken = Vec::new();
        let (decoded, outcome) = decode(&bytes, |fd| taken.push(fd));
        prop_assert_eq!(outcome, Ok(()));
        prop_assert_eq!(decoded.len(), events.len());
        prop_assert_eq!(taken, expected);
    }
}
