//! Sessions in containers, and the commands that they ran.
//!
//! Reads the history only.

use tonic::Status;

use super::backend::Service;
use super::paging::{next_page_token, page_limit, page_token};
use crate::api::failure::{optional_time, the_one, unreadable};
use crate::api::{convert, proto};
use crate::history::SessionFilter;
use crate::model::{FindingId, Session, printable};

impl Service {
    pub(super) async fn list_sessions(
        &self,
        request: proto::ListSessionsRequest,
    ) -> Result<proto::ListSessionsResponse, Status> {
        let filter = request.filter.unwrap_or_default();
        let filter = SessionFilter {
            state: convert::state_from_proto(filter.state()),
            since: optional_time("since", filter.since)?,
            until: optional_time("until", filter.until)?,
            container: self.resolve_any(filter.container).await?,
        };
        let after = page_token(&request.page_token)?;
        let limit = page_limit(request.page_size);
        let page = self.read(move |reader| reader.sessions(&filter, after, limit)).await?;
        Ok(proto::ListSessionsResponse {
            sessions: page.sessions.into_iter().map(convert::session_to_proto).collect(),
            next_page_token: next_page_token(page.next),
        })
    }

    pub(super) async fn get_session(
        &self,
        request: proto::GetSessionRequest,
    ) -> Result<proto::GetSessionResponse, Status> {
        let session = self.session(request.id).await?;
        let mut ids: Vec<FindingId> = session.finding.into_iter().collect();
        ids.extend(session.findings.iter().filter(|id| Some(**id) != session.finding));
        let findings = self.read(move |reader| reader.findings_of(&ids)).await?;
        let findings = findings.into_iter();
        let findings = findings.map(|one| convert::stored_finding_to_proto(one, request.as_json));
        Ok(proto::GetSessionResponse {
            session: Some(convert::session_to_proto(*session)),
            findings: findings.collect::<Result<_, _>>().map_err(|err| unreadable(&err))?,
        })
    }

    pub(super) async fn list_commands(
        &self,
        request: proto::ListCommandsRequest,
    ) -> Result<proto::ListCommandsResponse, Status> {
        let after = page_token(&request.page_token)?;
        let limit = page_limit(request.page_size);
        let id = self.session(request.session).await?.id;
        let page = self.read(move |reader| reader.commands(id, after, limit)).await?;
        Ok(proto::ListCommandsResponse {
            commands: page.commands.into_iter().map(convert::command_to_proto).collect(),
            next_page_token: next_page_token(page.next),
            session: id.to_string(),
        })
    }

    async fn session(&self, text: String) -> Result<Box<Session>, Status> {
        let shown = printable(text.as_bytes());
        let found = self.read(move |reader| reader.session(&text)).await?;
        the_one(found, "session", &shown)
    }
}
