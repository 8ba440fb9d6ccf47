//! `meshctl health`: one question, answered by the exit code, for whoever restarts what is ill or routes around it.

use std::time::Duration;

use mesh_proto::v1::{NodeStatus, StatusResponse};

use crate::cli::HealthArgs;
use crate::client::Client;
use crate::exit::{CliError, Exit};
use crate::generate::show;
use crate::signals::StopSignals;

/// What was found: healthy or not, and a line for people.
type Finding = (Exit, String);

/// Runs the command. A mesh that cannot be asked is one that is not healthy.
///
/// # Errors
/// [`CliError::BadAddress`], and what the machine denies.
pub async fn run(args: HealthArgs) -> Result<Exit, CliError> {
    let mut signals = StopSignals::watch()?;
    let asked = signals.unless(async { Ok(tokio::time::timeout(args.timeout, ask(&args)).await) }).await?;
    let (exit, words) = match asked {
        Ok(Ok(finding)) => finding,
        Ok(Err(error @ CliError::BadAddress { .. })) => return Err(error),
        Ok(Err(error)) => (Exit::Unmet, error.to_string()),
        Err(_) => (Exit::Unmet, unanswered(&args.target.grpc, args.timeout)),
    };
    show(&format!("{words}\n"))?;
    Ok(exit)
}

fn unanswered(addr: &str, waited: Duration) -> String {
    format!("no answer from {addr} within {waited:?}")
}

async fn ask(args: &HealthArgs) -> Result<Finding, CliError> {
    let mut client = Client::connect(&args.target.grpc).await?;
    match &args.node {
        Some(host) => Ok(of_node(&client.status().await?, host)),
        None if client.serving().await? => Ok((Exit::Ok, "serving".to_owned())),
        None => Ok((Exit::Unmet, "not serving: `meshctl status` says who is missing".to_owned())),
    }
}

/// The router lists nodes for as long as it hears of them.
fn of_node(status: &StatusResponse, host: &str) -> Finding {
    let found: Vec<&NodeStatus> = status.nodes.iter().filter(|node| host_of(&node.addr) == bare(host)).collect();
    if found.is_empty() {
        return (Exit::Unmet, format!("no node at {host} is a member of the mesh"));
    }
    let names: Vec<String> = found.iter().map(|node| format!("{}-{}", node.role, node.slot)).collect();
    (Exit::Ok, format!("{} at {host} is a member", names.join(", ")))
}

/// The host of `scheme://host:port`.
fn host_of(addr: &str) -> &str {
    let at = addr.split_once("://").map_or(addr, |(_, at)| at);
    bare(at.rsplit_once(':').map_or(at, |(host, _)| host))
}

/// An IPv6 address without its brackets.
fn bare(host: &str) -> &str {
    host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;
    use tonic::transport::Server;
    use tonic::transport::server::TcpIncoming;
    use tonic_health::ServingStatus;

    async fn health(flags: &[&str]) -> Result<Exit, CliError> {
        match Cli::try_parse_from(["meshctl", "health"].iter().chain(flags)).unwrap().command {
            Command::Health(args) => run(args).await,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn the_exit_code_is_what_the_health_service_says_and_silence_is_ill() {
        let incoming = TcpIncoming::bind(([127, 0, 0, 1], 0).into()).unwrap();
        let addr = incoming.local_addr().unwrap().to_string();
        let (reporter, service) = tonic_health::server::health_reporter();
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        for (status, exit) in [(ServingStatus::NotServing, Exit::Unmet), (ServingStatus::Serving, Exit::Ok)] {
            reporter.set_service_status("", status).await;
            assert_eq!(health(&["--grpc", &addr]).await.unwrap(), exit);
        }
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let silent = silent.local_addr().unwrap().to_string();
        assert_eq!(health(&["--grpc", &silent, "--timeout", "0.2"]).await.unwrap(), Exit::Unmet);
        assert_eq!(health(&["--grpc", "http://a b"]).await.unwrap_err().exit(), Exit::Usage);
    }

    #[test]
    fn a_node_is_found_by_the_host_that_it_is_reached_under() {
        let node = |addr: &str| NodeStatus { role: "expert".into(), addr: addr.into(), ..NodeStatus::default() };
        let nodes = ["tcp://4f1c:4711", "ucx://10.0.0.7:1", "http://[fe80::1]:9"].map(node).to_vec();
        let status = StatusResponse { nodes, ..StatusResponse::default() };
        for host in ["4f1c", "10.0.0.7", "fe80::1", "[fe80::1]"] {
            assert_eq!(of_node(&status, host).0, Exit::Ok, "{host}");
        }
        for host in ["4f1", "10.0.0.70", "tcp", ""] {
            assert_eq!(of_node(&status, host).0, Exit::Unmet, "{host}");
        }
    }
}
