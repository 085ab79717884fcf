//! How a container differs from its image, in messages of bounded size.
//!
//! Owns the limits of the messages: a client that reads only one message is not sent more than
//! it can read, and the message shows that it is incomplete.

use prost::Message as _;

use super::severity::{severity_from_proto, severity_to_proto};
use super::value::{Malformed, malformed, missing};
use crate::api::proto;
use crate::model::RootfsPath;
use crate::pipeline::{Diff, Difference, DifferenceKind};

/// The largest message, in bytes, without its last difference. Our client reads up to 64 MiB.
/// Others may read only 4 MiB, gRPC's default: those use `StreamDiff`.
const ONE_MESSAGE: usize = 32 << 20;

/// The same for each message of a stream.
const ONE_OF_MANY: usize = 1 << 20;

/// The differences that fit into one message. It is incomplete if there are more.
pub fn diff_to_proto(diff: &Diff) -> proto::DiffContainerResponse {
    let mut pages = pages(diff, ONE_MESSAGE);
    let first = pages.next().unwrap_or_default();
    let incomplete = diff.incomplete || pages.next().is_some();
    proto::DiffContainerResponse { incomplete, ..first }
}

/// All differences, in messages of bounded size: at least one message.
pub fn diff_to_protos(diff: &Diff) -> impl Iterator<Item = proto::DiffContainerResponse> {
    pages(diff, ONE_OF_MANY)
}

fn pages(diff: &Diff, most: usize) -> impl Iterator<Item = proto::DiffContainerResponse> {
    let mut rest = diff.differences.iter().peekable();
    let mut is_first = true;
    std::iter::from_fn(move || {
        if !std::mem::take(&mut is_first) && rest.peek().is_none() {
            return None;
        }
        let mut page = proto::DiffContainerResponse {
            namespace: diff.container.namespace.to_string(),
            id: diff.container.id.to_string(),
            differences: Vec::new(),
            incomplete: diff.incomplete,
        };
        let mut bytes = 0;
        while bytes < most
            && let Some(difference) = rest.next()
        {
            let difference = difference_to_proto(difference);
            // With its tag and length.
            bytes += difference.encoded_len() + 8;
            page.differences.push(difference);
        }
        Some(page)
    })
}

pub fn difference_to_proto(difference: &Difference) -> proto::Difference {
    use proto::difference::Change;
    let change = match difference.change {
        DifferenceKind::Added => Change::Added,
        DifferenceKind::Modified => Change::Modified,
        DifferenceKind::Removed => Change::Removed,
        DifferenceKind::Metadata => Change::Metadata,
        DifferenceKind::Relocated => Change::Relocated,
    };
    proto::Difference {
        path: difference.path.as_bytes().to_vec(),
        change: change.into(),
        kind: difference.finding.map(|(kind, _)| kind.name().to_owned()).unwrap_or_default(),
        severity: difference
            .finding
            .map_or(proto::Severity::Unspecified, |(_, severity)| severity_to_proto(severity))
            .into(),
    }
}

pub fn difference_from_proto(difference: &proto::Difference) -> Result<Difference, Malformed> {
    use proto::difference::Change;
    let finding = match difference.kind.as_str() {
        "" => None,
        kind => Some((
            kind.parse().map_err(malformed("difference.kind"))?,
            severity_from_proto(difference.severity())
                .ok_or_else(|| missing("difference.severity"))?,
        )),
    };
    Ok(Difference {
        path: RootfsPath::new(&difference.path).map_err(malformed("difference.path"))?,
        change: match difference.change() {
            Change::Unspecified => return Err(missing("difference.change")),
            Change::Added => DifferenceKind::Added,
            Change::Modified => DifferenceKind::Modified,
            Change::Removed => DifferenceKind::Removed,
            Change::Metadata => DifferenceKind::Metadata,
            Change::Relocated => DifferenceKind::Relocated,
        },
        finding,
    })
}
