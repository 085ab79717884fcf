//! Describes one containerd for `driftd doctor`: its version and its snapshotters.
//!
//! Makes a connection of its own; the daemon does not use it.

use std::path::Path;

use containerd_client::services::v1::PluginsRequest;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::version_client::VersionClient;

/// What a containerd reports about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    pub version: String,
    /// Snapshotters that are loaded and work.
    pub snapshotters: Vec<String>,
}

/// Describes the containerd behind `socket`. The error is a text for administrators.
pub async fn describe(socket: &Path) -> Result<Description, String> {
    // Connected to first, because tonic's own error would hide the kernel's.
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
