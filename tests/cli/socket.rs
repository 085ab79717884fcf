//! The socket: permissions, takeover, and the standard gRPC services.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use driftd::api::Listener;

use crate::executable;
use crate::node::Node;
use crate::program::Output;

#[test]
fn unauthorised_users_are_refused_with_their_uid() {
    let node = Node::start();
    let mode = fs::metadata(node.socket()).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o660);

    // The socket's mode keeps other users out. The test lifts it later, to reach the
    // daemon's own check.
    for directory in [node.dir.path(), &node.dir.path().join("run")] {
        fs::set_permissions(directory, Permissions::from_mode(0o755)).unwrap();
    }
    let binary = node.dir.path().join("driftd");
    executable::write(&binary, &fs::read(env!("CARGO_BIN_EXE_driftd")).unwrap()).unwrap();
    let list = || {
        let output = Command::new(&binary)
            .arg("findings")
            .env("DRIFTD_SOCKET", node.socket())
            .current_dir("/")
            .uid(65534)
            .gid(65534)
            .output()
            .expect("this test needs root");
        Output::of(output)
    };
    let locked_out = list();
    assert_eq!(locked_out.code, 2);
    assert_eq!(
        locked_out.err,
        format!(
            "error: may not use {}: only root and members of the group driftd may (try: sudo)\n",
            node.socket().display()
        )
    );
    fs::set_permissions(node.socket(), Permissions::from_mode(0o666)).unwrap();
    let refused = list();
    assert_eq!((refused.code, refused.out.as_str()), (2, ""));
    assert!(refused.err.starts_with("error: uid 65534 may not use driftd: "), "{refused:?}");
}

#[track_caller]
fn refusal(path: &Path) -> String {
    Listener::bind(path).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn a_socket_is_taken_over_only_from_an_ended_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run/driftd.sock");

    let first = Listener::bind(&path).unwrap();
    let err = refusal(&path);
    assert!(err.starts_with(&format!("another driftd serves {}", path.display())), "{err}");
    drop(first);
    assert!(!path.exists(), "removed at the end");

    // A daemon that was killed leaves its socket behind.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(Listener::bind(&path).unwrap());

    fs::write(&path, "precious").unwrap();
    let err = refusal(&path);
    assert!(err.contains("is no socket"), "{err}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn health_and_reflection_are_served() {
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

    let node = Node::start();
    let address = format!("unix:{}", node.socket().display());
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let channel =
            tonic::transport::Endpoint::try_from(address).unwrap().connect().await.unwrap();
        let request = HealthCheckRequest { service: "driftd.v1.DriftService".into() };
        let health = HealthClient::new(channel.clone()).check(request).await.unwrap();
        assert_eq!(health.into_inner().status(), ServingStatus::Serving);

        let other = channel.clone();
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let reply = ServerReflectionClient::new(channel)
            .server_reflection_info(tokio_stream::once(request))
            .await
            .unwrap()
            .into_inner()
            .message()
            .await
            .unwrap()
            .unwrap();
        let Some(MessageResponse::ListServicesResponse(services)) = reply.message_response else {
            panic!("{reply:?}");
        };
        let names: Vec<String> = services.service.into_iter().map(|service| service.name).collect();
        assert!(names.contains(&"driftd.v1.DriftService".to_owned()), "{names:?}");

        use tonic_reflection::pb::v1alpha as alpha;
        let request = alpha::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(alpha::server_reflection_request::MessageRequest::ListServices(
                String::new(),
            )),
        };
        let reply = alpha::server_reflection_client::ServerReflectionClient::new(other)
            .server_reflection_info(tokio_stream::once(request))
            .await
            .unwrap()
            .into_inner()
            .message()
            .await
            .unwrap()
            .unwrap();
        assert!(format!("{reply:?}").contains("driftd.v1.DriftService"), "u09: {reply:?}");
    });
}
