//! Findings: listed, shown one by one, followed, and the members of aggregated ones.
//!
//! Reads the history only. Owns the check of the filter that a client sends.

use std::sync::Arc;

use tonic::Status;

use super::backend::Service;
use super::paging::{next_page_token, page_limit, page_token};
use crate::api::failure::{optional_time, the_one, unreadable};
use crate::api::follow::Follower;
use crate::api::outbox::{Inbox, PATIENCE, outbox};
use crate::api::{convert, proto};
use crate::history::{Content, Filter};
use crate::model::{Finding, Kind, printable};

/// Responses that are sent with a finding: the newest ones.
const MAX_RESPONSES: usize = 32;

impl Service {
    pub(super) async fn list_findings(
        &self,
        request: proto::ListFindingsRequest,
    ) -> Result<proto::ListFindingsResponse, Status> {
        let filter = self.finding_filter(request.filter).await?;
        let after = page_token(&request.page_token)?;
        let limit = page_limit(request.page_size);
        let page = self.read(move |reader| reader.stored_findings(&filter, after, limit)).await?;
        let findings = page.findings.into_iter();
        let findings = findings.map(|one| convert::stored_finding_to_proto(one, request.as_json));
        Ok(proto::ListFindingsResponse {
            findings: findings.collect::<Result<_, _>>().map_err(|err| unreadable(&err))?,
            next_page_token: next_page_token(page.next),
        })
    }

    pub(super) async fn get_finding(
        &self,
        proto::GetFindingRequest { id, as_json }: proto::GetFindingRequest,
    ) -> Result<proto::GetFindingResponse, Status> {
        let shown = printable(id.as_bytes());
        let found = self.read(move |reader| reader.stored_finding(&id)).await?;
        let text = the_one(found, "finding", &shown)?;
        let finding = text.parse().map_err(|err| unreadable(&err))?;
        let about = finding.clone();
        let read = self.read(move |reader| {
            let responses = about.container_id().map(|container| reader.responses(container));
            Ok((responses.transpose()?.unwrap_or_default(), reader.also_in(&about)?))
        });
        let (mut responses, also_in) = read.await?;
        responses.retain(|response| response.requested_at >= finding.first_seen);
        let older = responses.len().saturating_sub(MAX_RESPONSES);
        let responses = responses.into_iter().skip(older);
        Ok(proto::GetFindingResponse {
            finding: Some(if as_json {
                convert::finding_text_to_proto(*text)
            } else {
                convert::finding_to_proto(finding)
            }),
            responses: responses.map(convert::response_to_proto).collect(),
            also_in: Some(convert::also_in_to_proto(&also_in)),
        })
    }

    pub(super) async fn list_members(
        &self,
        request: proto::ListMembersRequest,
    ) -> Result<proto::ListMembersResponse, Status> {
        let after = page_token(&request.page_token)?;
        let limit = page_limit(request.page_size);
        let id = self.finding(request.finding).await?.id;
        let page = self.read(move |reader| reader.members(id, after, limit)).await?;
        Ok(proto::ListMembersResponse {
            members: page.members.iter().map(convert::member_to_proto).collect(),
            next_page_token: next_page_token(page.next),
            finding: id.to_string(),
        })
    }

    pub(super) async fn follow_findings(
        &self,
        request: proto::FollowFindingsRequest,
    ) -> Result<Inbox, Status> {
        let filter = self.finding_filter(request.filter).await?;
        let cursor = request.after_cursor.unwrap_or_default();
        let (client, stream) = outbox(&self.followers.pool, cursor, PATIENCE);
        let follower = Follower {
            reading: Arc::clone(&self.followers.reading),
            reader: self.history.clone(),
            filter,
            sessions: request.sessions,
            as_json: request.as_json,
            committed: self.committed.clone(),
            stopping: self.stopping.clone(),
            client,
        };
        tokio::spawn(follower.run(request.after_cursor));
        Ok(stream)
    }

    /// The finding that `text` is the ID of, or the beginning of the ID.
    pub(super) async fn finding(&self, text: String) -> Result<Box<Finding>, Status> {
        let shown = printable(text.as_bytes());
        let found = self.read(move |reader| reader.finding(&text)).await?;
        the_one(found, "finding", &shown)
    }

    async fn finding_filter(&self, filter: Option<proto::FindingFilter>) -> Result<Filter, Status> {
        let filter = filter.unwrap_or_default();
        let minimum_severity = convert::severity_from_proto(filter.minimum_severity());
        let kinds: Vec<Vec<Kind>> = filter
            .kinds
            .iter()
            .map(|kind| Kind::named_by(kind))
            .collect::<Result<_, _>>()
            .map_err(|err| Status::invalid_argument(err.to_string()))?;
        Ok(Filter {
            container: self.resolve_any(filter.container).await?,
            image: (!filter.image.is_empty()).then_some(filter.image),
            kinds: kinds.concat(),
            minimum_severity,
            since: optional_time("since", filter.since)?,
            until: optional_time("until", filter.until)?,
            accepted: filter.accepted,
            with_accepted: filter.with_accepted,
            content: Content {
                paths: filter.paths,
                hashes: hexadecimal("hash", filter.hashes)?,
                sessions: hexadecimal("session", filter.sessions)?,
                pods: filter.pods,
                pod_namespaces: filter.pod_namespaces,
                labels: filter.labels,
                texts: filter.texts,
            },
        })
    }
}

/// The first digits of hashes or IDs, without the `sha256:` or the like before them.
fn hexadecimal(what: &str, texts: Vec<String>) -> Result<Vec<String>, Status> {
    let plain = |text: String| {
        let digits = text.split_once(':').map_or(&*text, |(_, digits)| digits).to_ascii_lowercase();
        let is_enough = digits.len() >= 8 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_enough {
            return Ok(digits);
        }
        Err(Status::invalid_argument(format!(
            "`{}` is no {what}: write 8 or more hexadecimal digits of it",
            printable(text.as_bytes())
        )))
    };
    texts.into_iter().map(plain).collect()
}
