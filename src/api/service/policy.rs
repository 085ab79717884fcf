//! The rules in force, and the request to read the policy files again.
//!
//! The pipeline has the rules, the history knows how often each has matched, and the daemon
//! reads the files.

use jiff::Timestamp;
use tokio::sync::oneshot;
use tonic::Status;

use super::backend::Service;
use crate::api::failure::stopping;
use crate::api::{convert, proto};
use crate::history;
use crate::pipeline::ApiRequest;

impl Service {
    pub(super) async fn get_policy(&self) -> Result<proto::GetPolicyResponse, Status> {
        let policy = self.ask(ApiRequest::Policy).await?;
        let hits = self.read(history::Reader::rule_hits).await?;
        let now = Timestamp::now();
        let rules = policy.rules.rules().iter();
        let rules = rules.map(|rule| convert::rule_to_proto(rule, hits.get(&*rule.id), now));
        Ok(proto::GetPolicyResponse {
            status: Some(convert::policy_status_to_proto(&policy, now)),
            rules: rules.collect(),
            files: policy.files.iter().map(convert::policy_file_to_proto).collect(),
        })
    }

    pub(super) async fn reload_policy(&self) -> Result<proto::ReloadPolicyResponse, Status> {
        let (reply, done) = oneshot::channel();
        let requests = &self.backend()?.policy_reloads;
        requests.send(reply).await.map_err(|_| stopping())?;
        done.await
            .map_err(|_| stopping())?
            .map_err(|refused| Status::invalid_argument(refused.to_string()))?;
        let policy = self.ask(ApiRequest::Policy).await?;
        let status = convert::policy_status_to_proto(&policy, Timestamp::now());
        Ok(proto::ReloadPolicyResponse { status: Some(status) })
    }
}
