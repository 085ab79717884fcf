//! Converts the model's types to the messages of the proto and back, and does nothing else.
//!
//! One file for each subject. `NAME_to_proto` cannot fail. `NAME_from_proto` fails with
//! [`Malformed`] if the other side is a version that uses other names or leaves fields out.

mod container;
mod diff;
mod evidence;
mod file;
mod finding;
mod gap;
mod hook;
mod policy;
mod process;
mod response;
mod session;
mod severity;
mod status;
#[cfg(test)]
mod tests;
mod timeline;
mod value;

pub use container::{container_to_proto, image_from_proto, pod_from_proto};
pub use diff::{diff_to_proto, diff_to_protos, difference_from_proto, difference_to_proto};
pub(super) use evidence::{evidence_case_to_proto, evidence_status_to_proto};
pub use file::file_type_name;
pub use finding::{
    also_in_from_proto, also_in_to_proto, finding_from_proto, finding_text_to_proto,
    finding_to_proto, member_from_proto, member_to_proto, stored_finding_to_proto,
};
pub(super) use gap::gap;
pub use gap::gap_to_proto;
pub use hook::{ended_from_proto, ended_to_proto, order_from_proto, order_to_proto};
pub use policy::{
    policy_file_from_proto, policy_file_to_proto, policy_status_to_proto, rule_to_proto,
};
pub use response::{
    action_from_proto, action_to_proto, case_from_proto, case_to_proto, outcome_from_proto,
    outcome_to_proto, response_from_proto, response_to_proto, stopped_rule_to_proto,
};
pub use session::{
    command_from_proto, command_to_proto, probe_from_proto, probe_to_proto, session_from_proto,
    session_to_proto, state_from_proto, state_to_proto,
};
pub use severity::{severity_from_proto, severity_to_proto};
pub(super) use status::{
    backlog_to_proto, endpoint_to_proto, finding_count_to_proto, gate_to_proto, loss_to_proto,
    missing_to_proto, queue_to_proto, thread_to_proto,
};
pub use timeline::{timeline_entry_from_proto, timeline_entry_to_proto};
pub(super) use value::count;
pub use value::{Malformed, optional_time_from_proto, time_from_proto, time_to_proto};
