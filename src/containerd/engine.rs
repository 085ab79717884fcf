//! Docker's API, for the one thing that only Docker can do: to leave a container stopped. Docker
//! starts a killed container again by its restart policy, and containerd has no say in that.
//!
//! The socket is Docker's own (setting `containerd.docker_socket`). The reply is bounded in size
//! and in time.

use std::path::Path;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::UnixStream;

use crate::model::printable;

/// How long Docker may take.
const PATIENCE: Duration = Duration::from_secs(3);
const MAX_REPLY: usize = 64 * 1024;

/// Sets a container's restart policy to `no`. The error is for people.
pub(super) async fn leave_stopped(socket: &Path, id: &str) -> Result<(), String> {
    leave_stopped_within(PATIENCE, socket, id).await
}

async fn leave_stopped_within(patience: Duration, socket: &Path, id: &str) -> Result<(), String> {
    let done = tokio::time::timeout(patience, update(socket, id)).await;
    let late = || Err(format!("Docker did not answer within {} s", patience.as_secs()));
    let done = done.unwrap_or_else(|_| late());
    done.map_err(|err| format!("{}: {err}", printable(socket.as_os_str().as_encoded_bytes())))
}

async fn update(socket: &Path, id: &str) -> Result<(), String> {
    // It becomes a part of a path.
    if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err("the container has no name of Docker's".to_owned());
    }
    let stream = UnixStream::connect(socket).await.map_err(|err| err.to_string())?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|err| err.to_string())?;
    let connection = tokio::spawn(connection);
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("/containers/{id}/update"))
        .header("host", "docker")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from_static(br#"{"RestartPolicy":{"Name":"no"}}"#)))
        .map_err(|err| err.to_string())?;
    let response = sender.send_request(request).await.map_err(|err| err.to_string())?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_REPLY).collect().await;
    connection.abort();
    if status == StatusCode::OK {
        return Ok(());
    }
    let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    Err(format!("Docker answered {status}{}", message(&body)))
}

/// Docker's own words for an error.
fn message(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Error {
        message: String,
    }
    let text = serde_json::from_slice::<Error>(body).map(|error| error.message);
    text.map(|text| format!(" ({})", printable(text.as_bytes()))).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixListener;

    use super::*;

    /// A server that gives one answer. Returns what it was sent.
    async fn asked(answer: &'static str, id: &str) -> (Result<(), String>, String) {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("docker.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let serve = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"}}") {
                let mut more = [0; 1024];
                let read = stream.read(&mut more).await.unwrap();
                request.extend_from_slice(&more[..read]);
            }
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8(request).unwrap()
        });
        let done = leave_stopped(&socket, id).await;
        (done, serve.await.unwrap())
    }

    #[tokio::test]
    async fn docker_is_asked_for_one_policy_of_one_container() {
        let ok = "HTTP/1.1 200 OK\r\ncontent-length: 17\r\n\r\n{\"Warnings\":null}";
        let (done, request) = asked(ok, "0a1b2c").await;
        assert_eq!(done, Ok(()));
        assert!(request.starts_with("POST /containers/0a1b2c/update HTTP/1.1\r\n"), "{request}");
        assert!(request.ends_with("\r\n\r\n{\"RestartPolicy\":{\"Name\":\"no\"}}"), "{request}");
    }

    #[tokio::test]
    async fn a_refusal_is_an_error_in_dockers_own_words() {
        let missing = "HTTP/1.1 404 Not Found\r\ncontent-length: 43\r\n\r\n\
                       {\"message\":\"No such container: \\u001b[2Jx\"}";
        let (done, _) = asked(missing, "0a1b2c").await;
        let err = done.unwrap_err();
        assert!(err.contains("404 Not Found (No such container: "), "{err}");
        assert!(!err.contains('\u{1b}'), "{err:?}");
    }

    #[tokio::test]
    async fn a_docker_that_is_not_there_or_does_not_answer_is_an_error_in_time() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("docker.sock");
        let err = leave_stopped(&socket, "0a1b2c").await.unwrap_err();
        assert!(err.contains("docker.sock: No such file or directory"), "{err}");
        let _listener = UnixListener::bind(&socket).unwrap();
        let short = Duration::from_millis(20);
        let err = leave_stopped_within(short, &socket, "0a1b2c").await.unwrap_err();
        assert!(err.contains("did not answer within"), "{err}");
        let err = leave_stopped(&socket, "../x").await.unwrap_err();
        assert!(err.contains("no name of Docker's"), "{err}");
    }
}
