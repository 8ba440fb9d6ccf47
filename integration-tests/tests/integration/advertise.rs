//! Nodes that listen at every address of their machine and are reached under a name, as containers are.

use std::process::Stdio;

use integration_tests::fixture;
use integration_tests::mesh::binary;
use integration_tests::patience::{eventually, soon};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// A program and its ready line; it dies with this.
async fn start(program: &str, args: &[&str]) -> (Child, Value) {
    let mut command = Command::new(binary(program));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child = command.spawn().expect("the program starts");
    let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
    let line = soon("the ready line", lines.next_line()).await.expect("stdout is readable");
    let line = line.unwrap_or_else(|| panic!("{program} {args:?} ended"));
    (child, serde_json::from_str(&line).expect("a JSON line"))
}

async fn code(program: &str, args: &[&str]) -> (i32, String) {
    let output = Command::new(binary(program)).args(args).kill_on_drop(true).output();
    let output = soon("the program's end", output).await.expect("it runs");
    let words = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&words).into_owned())
}

#[tokio::test]
async fn a_mesh_of_nodes_that_advertise_a_name_serves_and_says_who_is_well() {
    let (_router, ready) = start("router-svc", &["--grpc", "127.0.0.1:0"]).await;
    let grpc = ready["grpc"].as_str().expect("an address").to_owned();
    assert_eq!(code("meshctl", &["health", "--grpc", &grpc]).await.0, 1, "nothing serves yet");

    let (uri, model) = (format!("http://{grpc}"), fixture::tiny_moe().display().to_string());
    let common = ["--model", &model, "--router", &uri, "--transport", "tcp", "--dtype", "f32", "--threads", "1"];
    let args = [&common[..], &["--listen", "0.0.0.0:0", "--advertise", "localhost"]].concat();
    let (expert, ready) = start("expert-svc", &args).await;
    assert!(ready["addr"].as_str().is_some_and(|addr| addr.starts_with("tcp://localhost:")), "{ready}");
    let (_attention, ready) = start("attention-svc", &args).await;
    assert!(ready["addr"].as_str().is_some_and(|addr| addr.starts_with("http://localhost:")), "{ready}");

    eventually("health says so", || async {
        let (code, words) = code("meshctl", &["health", "--grpc", &grpc]).await;
        if code == 0 { Ok(()) } else { Err(words) }
    })
    .await;
    let (exit, words) =
        code("meshctl", &["generate", "--grpc", &grpc, "--token-ids", "5,6,7", "--max-new-tokens", "8"]).await;
    assert_eq!(exit, 0, "{words}");
    for (host, exit) in [("localhost", 0), ("elsewhere", 1)] {
        let found = code("meshctl", &["health", "--grpc", &grpc, "--node", host]).await;
        assert_eq!(found.0, exit, "{host}: {}", found.1);
    }

    drop(expert);
    eventually("a mesh without experts is not well", || async {
        let (code, words) = code("meshctl", &["health", "--grpc", &grpc]).await;
        if code == 1 { Ok(()) } else { Err(words) }
    })
    .await;
}

#[tokio::test]
async fn what_cannot_be_advertised_is_a_mistake_that_is_named() {
    for host in ["0.0.0.0", "http://localhost", "localhost:80", ""] {
        for program in ["expert-svc", "attention-svc"] {
            let args = ["--model", "m", "--router", "http://127.0.0.1:1", "--advertise", host];
            let (exit, words) = code(program, &args).await;
            assert!(exit == 64 && words.contains("--advertise"), "{program} {host:?}: {exit} {words}");
        }
    }
}
