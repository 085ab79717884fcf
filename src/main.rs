use std::process::ExitCode;
fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some("guardian") => {
            driftd::guardian::watch_over(args.next().unwrap().parse().unwrap()).unwrap();
            ExitCode::SUCCESS
        }
        _ => match driftd::daemon::run(
            driftd::config::Config::load(args.next().map(std::path::PathBuf::from).as_deref())
                .unwrap(),
        ) {
            Ok(e) => e.into(),
            Err(e) => {
                eprintln!("driftd: {e:#}");
                ExitCode::from(2)
            }
        },
    }
}
