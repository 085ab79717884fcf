//! Hooks: what a runner is to run, and how it has ended.

use std::path::PathBuf;
use std::time::Duration;

use crate::api::proto;
use crate::api::proto::end_hook_request::End as ProtoEnd;
use crate::hooks::{End, Ended, MAX_OUTPUT, Order};

pub fn order_to_proto(number: u64, order: Order) -> proto::HookRun {
    let Order { hook, program, arguments, environment, input, timeout, user } = order;
    proto::HookRun {
        number,
        hook,
        // The settings are a text file.
        program: program.to_string_lossy().into_owned(),
        arguments,
        environment: environment.into_iter().collect(),
        input,
        timeout_milliseconds: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        user,
    }
}

/// The order, with its number.
pub fn order_from_proto(run: proto::HookRun) -> (u64, Order) {
    let proto::HookRun { number, hook, program, arguments, environment, input, .. } = run;
    let order = Order {
        hook,
        program: PathBuf::from(program),
        arguments,
        environment: environment.into_iter().collect(),
        input,
        timeout: Duration::from_millis(run.timeout_milliseconds),
        user: run.user,
    };
    (number, order)
}

pub fn ended_to_proto(number: u64, ended: Ended) -> proto::EndHookRequest {
    let end = match ended.end {
        End::Exited(status) => ProtoEnd::Status(status),
        End::Signal(signal) => ProtoEnd::Signal(signal),
        End::TimedOut => ProtoEnd::TimedOut(true),
        End::Stopped | End::RunnerGone | End::NoReport => ProtoEnd::Stopped(true),
        End::NotStarted(why) => ProtoEnd::NotStarted(why),
    };
    proto::EndHookRequest { number, end: Some(end), output: ended.output }
}

/// `None` if the end is missing.
pub fn ended_from_proto(request: proto::EndHookRequest) -> Option<Ended> {
    let end = match request.end? {
        ProtoEnd::Status(status) => End::Exited(status),
        ProtoEnd::Signal(signal) => End::Signal(signal),
        ProtoEnd::TimedOut(_) => End::TimedOut,
        ProtoEnd::Stopped(_) => End::Stopped,
        ProtoEnd::NotStarted(why) => End::NotStarted(why.chars().take(MAX_OUTPUT).collect()),
    };
    let mut output = request.output;
    output.drain(..output.len().saturating_sub(MAX_OUTPUT));
    Some(Ended { end, output })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_and_ends_are_the_same_at_the_other_side() {
        let order = Order {
            hook: "page".into(),
            program: "/usr/bin/page".into(),
            arguments: vec!["a b".into()],
            environment: [("X".to_owned(), "y".to_owned())].into(),
            input: b"{}\n\xff".to_vec(),
            timeout: Duration::from_millis(1500),
            user: Some("pager".into()),
        };
        assert_eq!(order_from_proto(order_to_proto(7, order.clone())), (7, order));
        for end in [
            End::Exited(0),
            End::Exited(3),
            End::Signal(9),
            End::TimedOut,
            End::Stopped,
            End::NotStarted("why".into()),
        ] {
            let ended = Ended { end, output: b"\xff".to_vec() };
            let sent = ended_to_proto(7, ended.clone());
            assert_eq!(sent.number, 7);
            assert_eq!(ended_from_proto(sent), Some(ended));
        }
        let nothing = proto::EndHookRequest { number: 7, end: None, output: Vec::new() };
        assert_eq!(ended_from_proto(nothing), None);
    }
}
