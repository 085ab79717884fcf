//! The hooks of `contrib/` that need no node: a small HTTP server takes the place of the
//! Kubernetes API.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;

use serde_json::{Value, json};

/// What the server has received.
#[derive(Debug)]
struct Received {
    line: String,
    authorization: Option<String>,
    body: Value,
}

/// Answers one request, and returns it.
fn serve_once(listener: &TcpListener, status: &str) -> Received {
    let (stream, _) = listener.accept().unwrap();
    let mut reader = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if line.trim_end().is_empty() {
            break;
        }
        lines.push(line.trim_end().to_owned());
    }
    let header = |name: &str| {
        let found = lines.iter().filter_map(|line| line.split_once(": "));
        found
            .filter(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.to_owned())
            .next()
    };
    let length = header("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let answer = "{\"kind\":\"Status\",\"message\":\"as scripted\"}";
    let length = answer.len();
    write!(reader.get_mut(), "HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{answer}")
        .unwrap();
    Received {
        authorization: header("authorization"),
        line: lines.remove(0),
        body: serde_json::from_slice(&body).unwrap(),
    }
}

fn finding(pod: &Value) -> Value {
    let mut finding: Value = serde_json::from_str(include_str!("data/finding.json")).unwrap();
    finding["container"]["pod"] = pod.clone();
    json!({"schema": "driftd.hook/v1", "hook": "delete-pod", "rule": "r", "finding": finding})
}

/// Runs the hook as `driftd hooks` does: a clean environment, and the JSON as its input.
fn delete_pod(server: &str, token: &Path, input: &Value) -> Output {
    delete_pod_of("k8s.io", server, token, input)
}

fn delete_pod_of(namespace: &str, server: &str, token: &Path, input: &Value) -> Output {
    let program = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("contrib/hooks/kubernetes-delete-pod/kubernetes-delete-pod");
    let mut child = Command::new(program)
        .args(["--server", server, "--grace", "7", "--token-file"])
        .arg(token)
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("DRIFTD_NAMESPACE", namespace)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may end before it has read its input.
    let _ = child.stdin.take().unwrap().write_all(input.to_string().as_bytes());
    child.wait_with_output().unwrap()
}

fn text_of(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn the_pod_of_a_finding_is_deleted_by_its_uid() {
    let directory = tempfile::tempdir().unwrap();
    let token = directory.path().join("token");
    std::fs::write(&token, "abc.DEF-1\n").unwrap();
    let pod = json!({"namespace": "prod", "name": "shop-7d9f", "uid": "3c0f-4b8e"});
    for (status, code, text) in [
        ("200 OK", 0, "deleted pod prod/shop-7d9f"),
        ("404 Not Found", 0, "is gone already"),
        ("409 Conflict", 0, "is another one now (its UID is not 3c0f-4b8e): nothing was deleted"),
        ("403 Forbidden", 1, "answered 403: {\"kind\":\"Status\",\"message\":\"as scripted\"}"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = format!("http://127.0.0.1:{}", listener.local_addr().unwrap().port());
        let served = thread::spawn(move || serve_once(&listener, status));
        let output = delete_pod(&server, &token, &finding(&pod));
        assert_eq!(output.status.code(), Some(code), "{status}: {}", text_of(&output));
        assert!(text_of(&output).contains(text), "{status}: {}", text_of(&output));
        let received = served.join().unwrap();
        assert_eq!(received.line, "DELETE /api/v1/namespaces/prod/pods/shop-7d9f HTTP/1.1");
        assert_eq!(received.authorization.as_deref(), Some("Bearer abc.DEF-1"));
        let expected = json!({
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "gracePeriodSeconds": 7,
            "preconditions": {"uid": "3c0f-4b8e"},
        });
        assert_eq!(received.body, expected);
    }
}

#[test]
fn nothing_is_sent_for_what_is_no_pod_or_to_a_server_that_proves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let token = directory.path().join("token");
    std::fs::write(&token, "abc").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = format!("http://127.0.0.1:{port}");
    let pod = |name: &str, uid: &str| json!({"namespace": "prod", "name": name, "uid": uid});
    for (pod, text) in [
        (Value::Null, "belongs to no pod"),
        (pod("../../nodes/n", "u"), "names no pod of Kubernetes"),
        (pod("a..b", "u"), "names no pod of Kubernetes"),
        (pod("a b", "u"), "names no pod of Kubernetes"),
        (pod("a", "u\"x"), "has no UID of Kubernetes"),
    ] {
        let output = delete_pod(&server, &token, &finding(&pod));
        assert_eq!(output.status.code(), Some(1), "{pod}: {}", text_of(&output));
        assert!(text_of(&output).contains(text), "{pod}: {}", text_of(&output));
    }
    let output = delete_pod_of("moby", &server, &token, &finding(&pod("a", "u")));
    assert!(text_of(&output).contains("is not the kubelet's"), "{}", text_of(&output));
    for server in [format!("http://example.com:{port}"), String::new()] {
        let output = delete_pod(&server, &token, &finding(&pod("a", "u")));
        assert!(text_of(&output).contains("--server is missing"), "{}", text_of(&output));
    }
    assert!(listener.accept().is_err(), "no request came");
}
