//! Records as the kernel writes them, and arbitrary bytes.

use proptest::prelude::*;

use super::*;

const LAYOUT: Layout = Layout { cgroup: true, file_name: 8 };

fn record(kind: u32, misc: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = kind.to_ne_bytes().to_vec();
    bytes.extend(misc.to_ne_bytes());
    bytes.extend(u16::try_from(HEADER + body.len()).unwrap().to_ne_bytes());
    bytes.extend(body);
    bytes
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn trailer(time: u64) -> Vec<u8> {
    [&words(&[7, 7])[..], &time.to_ne_bytes()].concat()
}

fn padded(name: &[u8]) -> Vec<u8> {
    let mut name = name.to_vec();
    name.resize((name.len() / 8 + 1) * 8, 0);
    name
}

fn mapped(name: &[u8]) -> Vec<u8> {
    let mut body = words(&[7, 8]);
    body.extend([0x1000_u64, 0x2000, 0].iter().flat_map(|word| word.to_ne_bytes()));
    body.extend(words(&[0, 39]));
    body.extend([99_u64, 1].iter().flat_map(|word| word.to_ne_bytes()));
    body.extend(words(&[5, 2]));
    body.extend(padded(name));
    body.extend(trailer(5));
    record(RECORD_MMAP2, 2, &body)
}

fn executed(file_name: &[u8], layout: Layout) -> Vec<u8> {
    let name = padded(file_name);
    let length = u32::try_from(name.len()).unwrap();
    let mut raw = words(&[1, 2, 20 | (length << 16), 7, 7]);
    raw.extend(name);
    // The kernel's own rounding: the length word and the data together.
    raw.resize((raw.len() + 4).next_multiple_of(8) - 4, 0);
    let mut body = words(&[7, 7]);
    body.extend(6_u64.to_ne_bytes());
    body.extend(u32::try_from(raw.len()).unwrap().to_ne_bytes());
    body.extend(raw);
    if layout.cgroup {
        body.extend(4711_u64.to_ne_bytes());
    }
    record(RECORD_SAMPLE, 1, &body)
}

fn decoded(bytes: &[u8], layout: Layout) -> Vec<Record> {
    let mut records = Vec::new();
    decode(bytes, layout, &mut records).unwrap();
    records
}

#[test]
fn an_execve_is_read_as_the_kernel_writes_it() {
    let began = record(RECORD_COMM, MISC_COMM_EXEC, &[words(&[7, 7, 0, 0]), trailer(4)].concat());
    let bytes = [began, mapped(b"/memfd:a (deleted)"), executed(b"/dev/fd/3", LAYOUT)].concat();
    let expected = [
        Record::Began { pid: 7, time: 4 },
        Record::Mapped(Mapped {
            pid: 7,
            time: 5,
            address: 0x1000,
            length: 0x2000,
            device: rustix::fs::makedev(0, 39),
            inode: 99,
            is_shared: false,
            name: (*b"/memfd:a (deleted)").into(),
        }),
        Record::Executed(Executed {
            pid: 7,
            time: 6,
            file_name: (*b"/dev/fd/3").into(),
            cgroup: Some(4711),
        }),
    ];
    assert_eq!(decoded(&bytes, LAYOUT), expected);
}

#[test]
fn older_kernels_report_no_control_group() {
    let layout = Layout { cgroup: false, ..LAYOUT };
    let expected = Executed { pid: 7, time: 6, file_name: (*b"/x").into(), cgroup: None };
    assert_eq!(decoded(&executed(b"/x", layout), layout), [Record::Executed(expected)]);
}

#[test]
fn processes_come_and_go_and_threads_are_not_reported() {
    let task = |kind, pid, parent, tid| {
        let time = 0_u64.to_ne_bytes();
        let body = [words(&[pid, parent, tid, parent]), time.to_vec(), trailer(9)].concat();
        record(kind, 0, &body)
    };
    let bytes = [
        task(RECORD_FORK, 8, 7, 8),
        task(RECORD_FORK, 8, 8, 9),
        task(RECORD_EXIT, 8, 8, 9),
        task(RECORD_EXIT, 8, 7, 8),
    ];
    let expected =
        [Record::Forked { pid: 8, parent: 7, time: 9 }, Record::Exited { pid: 8, time: 9 }];
    assert_eq!(decoded(&bytes.concat(), LAYOUT), expected);
}

#[test]
fn what_the_kernel_lost_is_reported() {
    let body = [1_u64.to_ne_bytes(), 12_u64.to_ne_bytes()].concat();
    let bytes = record(RECORD_LOST, 0, &[body, trailer(3)].concat());
    assert_eq!(decoded(&bytes, LAYOUT), [Record::Lost { count: 12, time: 3 }]);
}

#[test]
fn a_record_that_lies_about_its_length_ends_the_reading() {
    let mut bytes = mapped(b"/x");
    let whole = bytes.len();
    bytes.extend(record(RECORD_EXIT, 0, &[]));
    bytes[whole + 6] = 200;
    let mut records = Vec::new();
    let outcome = decode(&bytes, LAYOUT, &mut records);
    assert_eq!(outcome, Err(Malformed { length: 200, left: 8 }));
    assert_eq!(records.len(), 1);
}

/// A new program's stack, whose arguments lie `gap` bytes above what points to them.
fn started(gap: usize, copied: usize) -> Vec<u8> {
    const POINTER: u64 = 0x7ffc_0000_1230;
    let address = POINTER + 32 + gap as u64;
    let mut copy: Vec<u8> =
        [2, address, address + 3, 0].iter().flat_map(|word: &u64| word.to_ne_bytes()).collect();
    copy.resize(copy.len() + gap, 0);
    copy.extend(b"ls\0-l\0");
    copy.resize(copy.len().next_multiple_of(8), 0);
    let mut body = words(&[7, 8]);
    let size = copy.len() as u64;
    body.extend([6, ABI_64, POINTER, size].iter().flat_map(|word| word.to_ne_bytes()));
    body.extend(copy);
    body.extend((copied as u64).to_ne_bytes());
    record(RECORD_SAMPLE, 2, &body)
}

#[track_caller]
fn check_arguments(bytes: &[u8], expected: &[Record]) {
    let mut records = Vec::new();
    assert_eq!(decode_arguments(bytes, &mut records), Ok(0));
    assert_eq!(records, expected);
}

#[test]
fn arguments_are_reported_only_if_all_of_them_were_copied() {
    let expected = Record::Arguments { pid: 7, time: 6, arguments: (*b"ls\0-l\0").into() };
    check_arguments(&started(1000, 32 + 1000 + 6), std::slice::from_ref(&expected));
    check_arguments(&started(1000, 32 + 1000 + 5), &[]);
    check_arguments(&started(1000, 0), &[]);
    // More than there is.
    check_arguments(&started(0, 4096), &[]);
    let mut kernels = started(0, 38);
    kernels[HEADER + 16] = 0;
    check_arguments(&[kernels, started(0, 38)].concat(), &[expected]);
}

#[test]
fn arguments_that_found_no_room_are_counted_and_are_no_loss() {
    let body = [1_u64.to_ne_bytes(), 12_u64.to_ne_bytes()].concat();
    let bytes = record(RECORD_LOST, 0, &[body, trailer(3)].concat());
    let mut records = Vec::new();
    assert_eq!(decode_arguments(&bytes, &mut records), Ok(12));
    assert_eq!(records, []);
}

proptest! {
    #[test]
    fn any_bytes_are_arguments_or_malformed(bytes: Vec<u8>) {
        let _ = decode_arguments(&bytes, &mut Vec::new());
    }

    #[test]
    fn any_sample_is_arguments_or_passed_over(
        body in proptest::collection::vec(any::<u8>(), 0..300), size in 0..300_u64,
    ) {
        let mut body = body;
        if let Some(place) = body.get_mut(32..40) {
            place.copy_from_slice(&size.to_ne_bytes());
        }
        if let Some(place) = body.get_mut(16..24) {
            place.copy_from_slice(&ABI_64.to_ne_bytes());
        }
        let bytes = record(RECORD_SAMPLE, 0, &body);
        decode_arguments(&bytes, &mut Vec::new()).unwrap();
    }

    #[test]
    fn any_bytes_are_records_or_malformed(
        bytes: Vec<u8>, cgroup: bool, file_name in 0..64_usize,
    ) {
        let _ = decode(&bytes, Layout { cgroup, file_name }, &mut Vec::new());
    }

    #[test]
    fn any_body_is_a_record_or_passed_over(
        kind in 0..20_u32, misc: u16, body in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let bytes = record(kind, misc, &body);
        let mut records = Vec::new();
        decode(&bytes, LAYOUT, &mut records).unwrap();
        prop_assert!(records.len() <= 1);
    }

    #[test]
    fn any_name_is_read_back(name in proptest::collection::vec(1_u8.., 1..200)) {
        let records = decoded(&[mapped(&name), executed(&name, LAYOUT)].concat(), LAYOUT);
        let [Record::Mapped(mapped), Record::Executed(executed)] = &records[..] else {
            return Err(TestCaseError::fail(format!("{records:?}")));
        };
        prop_assert_eq!((&*mapped.name, &*executed.file_name), (&name[..], &name[..]));
    }
}
