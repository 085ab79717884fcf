//! A headless Chromium, driven over its DevTools protocol.
//!
//! Each has a profile of its own, which is removed with it.

use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use serde_json::{Value, json};
use tempfile::TempDir;
use tungstenite::{Message, WebSocket};

/// How long a step may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// What it is called on Debian and on Ubuntu.
const NAMES: &[&str] = &["chromium", "chromium-browser"];

const OPTIONS: &[&str] = &[
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
];

pub(crate) struct Chromium {
    child: Child,
    /// Its profile.
    _dir: TempDir,
    socket: WebSocket<TcpStream>,
    number: u64,
    /// The page's session of the protocol.
    session: Option<String>,
    events: Vec<Value>,
}

/// What happened while a page was loaded and shown.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Visit {
    /// The addresses that were requested.
    pub(crate) requests: Vec<String>,
    /// Errors of scripts, messages of the console, violations of the security policy.
    pub(crate) complaints: Vec<String>,
}

impl Chromium {
    pub(crate) fn start() -> Chromium {
        let dir = tempfile::tempdir().unwrap();
        let spawn = |name: &&str| {
            let mut command = Command::new(name);
            command.args(OPTIONS).arg(format!("--user-data-dir={}", dir.path().display()));
            command.arg("about:blank").stdin(Stdio::null());
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()
        };
        let child = NAMES.iter().find_map(spawn).unwrap_or_else(|| {
            panic!("no program {NAMES:?}: it shows the page of a report (try: make setup)")
        });
        let mut running = Running(Some(child));
        let socket = connect(&dir.path().join("DevToolsActivePort"), &mut running);
        let child = running.0.take().unwrap();
        let mut browser =
            Chromium { child, _dir: dir, socket, number: 0, session: None, events: Vec::new() };
        let target = browser.call("Target.createTarget", &json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let session = browser.call("Target.attachToTarget", &attach);
        browser.session = Some(session["sessionId"].as_str().unwrap().to_owned());
        for domain in ["Page", "Network", "Log", "Runtime", "Audits"] {
            browser.call(&format!("{domain}.enable"), &json!({}));
        }
        browser
    }

    /// Sends a request and waits for its result. Keeps the events that come before it.
    #[track_caller]
    pub(crate) fn call(&mut self, method: &str, params: &Value) -> Value {
        self.number += 1;
        let mut request = json!({ "id": self.number, "method": method, "params": params });
        if let Some(session) = &self.session {
            request["sessionId"] = session.as_str().into();
        }
        self.socket.send(Message::text(request.to_string())).unwrap();
        loop {
            let mut message = self.read();
            if message["id"] == self.number {
                assert!(message["error"].is_null(), "{method}: {message}");
                return message["result"].take();
            }
            self.events.push(message);
        }
    }

    fn read(&mut self) -> Value {
        loop {
            match self.socket.read().expect("chromium answers in time") {
                Message::Text(text) => return serde_json::from_str(&text).unwrap(),
                Message::Close(_) => panic!("chromium has closed the connection"),
                _ => (),
            }
        }
    }

    /// Opens a file in a window of this width.
    pub(crate) fn visit(&mut self, file: &Path, width: u32) -> Visit {
        let window =
            json!({ "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", &window);
        self.events.clear();
        let url = format!("file://{}", file.display());
        let opened = self.call("Page.navigate", &json!({ "url": url }));
        assert!(opened["errorText"].is_null(), "{opened}");
        while !self.events.iter().any(|event| event["method"] == "Page.loadEventFired") {
            let event = self.read();
            self.events.push(event);
        }
        // Two frames later, what the page has asked for has been asked for.
        let painted =
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))";
        self.call("Runtime.evaluate", &json!({ "expression": painted, "awaitPromise": true }));
        let of = |method: &str| {
            let method = method.to_owned();
            self.events.iter().filter(move |event| event["method"] == *method)
        };
        let requests = of("Network.requestWillBeSent");
        let complaints = [
            "Log.entryAdded",
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Audits.issueAdded",
        ];
        Visit {
            requests: requests
                .map(|event| event["params"]["request"]["url"].as_str().unwrap().to_owned())
                .collect(),
            complaints: complaints
                .into_iter()
                .flat_map(of)
                .map(|event| event["params"].to_string())
                .collect(),
        }
    }

    /// The value of an expression in the page.
    #[track_caller]
    pub(crate) fn value(&mut self, expression: &str) -> Value {
        let request = json!({ "expression": expression, "returnByValue": true });
        let mut result = self.call("Runtime.evaluate", &request);
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result}");
        result["result"]["value"].take()
    }

    /// A picture of the page, as PNG; of its beginning if it is very long.
    pub(crate) fn picture(&mut self) -> Vec<u8> {
        let mut size = self.call("Page.getLayoutMetrics", &json!({}))["cssContentSize"].take();
        size["height"] = size["height"].as_f64().unwrap().min(8000.0).into();
        let clip =
            json!({ "x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1 });
        let request = json!({ "format": "png", "captureBeyondViewport": true, "clip": clip });
        decode(&self.call("Page.captureScreenshot", &request))
    }

    /// The page as it is printed, as PDF.
    pub(crate) fn print(&mut self) -> Vec<u8> {
        let request = json!({ "printBackground": true, "preferCSSPageSize": true, "paperWidth": 8.27, "paperHeight": 11.69 });
        decode(&self.call("Page.printToPDF", &request))
    }
}

fn decode(reply: &Value) -> Vec<u8> {
    base64::engine::general_purpose::STANDARD.decode(reply["data"].as_str().unwrap()).unwrap()
}

/// Waits until the browser has written where it listens, and connects.
fn connect(port_file: &Path, running: &mut Running) -> WebSocket<TcpStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = fs::read_to_string(port_file).unwrap_or_default();
        if let Some((port, path)) = text.split_once('\n') {
            let stream = TcpStream::connect(("127.0.0.1", port.parse().unwrap())).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let url = format!("ws://127.0.0.1:{port}{}", path.trim());
            return tungstenite::client(url, stream).unwrap().0;
        }
        let ended = running.0.as_mut().unwrap().try_wait().unwrap();
        assert_eq!(ended, None, "chromium has ended at once");
        assert!(Instant::now() < deadline, "chromium does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Ends the browser if the connection to it fails.
struct Running(Option<Child>);

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        // It ends its own processes, and nothing writes into its profile any more.
        self.session = None;
        let _ = self.socket.send(Message::text(r#"{"id":0,"method":"Browser.close"}"#));
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
