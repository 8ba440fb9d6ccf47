//! The router as a process: what it prints, and how it ends.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

fn router(args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_router-svc"));
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null());
    command.spawn().unwrap()
}

#[test]
fn it_prints_one_line_of_json_when_it_listens_and_stops_in_good_order() {
    let mut child = router(&["--grpc", "127.0.0.1:0", "--attention-min", "2"]);
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    let ready: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(ready["ready"], "router");
    let addr: std::net::SocketAddr = ready["grpc"].as_str().unwrap().parse().unwrap();
    assert_ne!(addr.port(), 0);
    std::net::TcpStream::connect(addr).unwrap();
    let killed = Command::new("sh").args(["-c", &format!("kill -TERM {}", child.id())]).status().unwrap();
    assert!(killed.success());
    assert!(child.wait().unwrap().success());
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "", "logs go to stderr");
    let mut log = String::new();
    child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(log.contains("router stopped"), "{log}");
}

#[test]
fn a_configuration_that_cannot_be_run_is_named_and_exits_64() {
    for (args, named) in [
        (&["--grpc", "nowhere"][..], "--grpc"),
        (&["--experts-min", "0"], "experts-min"),
        (&["--lease-ms", "900"], "lease"),
        (&["--log", "router_svc=loud"], "loud"),
        (&["--colour"], "--colour"),
    ] {
        let out = router(args).wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(64), "{args:?}");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(said.contains(named), "{args:?}: {said}");
        assert!(out.stdout.is_empty());
    }
}
