//! What one containerd is, for `driftd doctor`.

use std::path::Path;

use containerd_client::services::v1::PluginsRequest;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::version_client::VersionClient;

/// A containerd that answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    pub version: String,
    /// Snapshotters that are loaded and work.
    pub snapshotters: Vec<String>,
}

/// Asks the containerd behind `socket` what it is; the error is in words.
pub async fn describe(socket: &Path) -> Result<Description, String> {
    // Asked first, because tonic's own error would hide what the kernel says.
    tokio::net::UnixStream::connect(socket).await.map_err(|err| err.to_string())?;
    let channel = containerd_client::connect(socket).await.map_err(|err| err.to_string())?;
    let version = VersionClient::new(channel.clone())
        .version(())
        .await
        .map_err(|status| status.message().to_owned())?
        .into_inner()
        .version;
    let plugins = IntrospectionClient::new(channel)
        .plugins(PluginsRequest { filters: vec!["type==io.containerd.snapshotter.v1".into()] })
        .await
        .map_err(|status| status.message().to_owned())?
        .into_inner()
        .plugins;
    let snapshotters = plugins
        .into_iter()
        .filter(|plugin| plugin.init_err.is_none())
        .map(|plugin| plugin.id)
        .collect();
    Ok(Description { version, snapshotters })
}
