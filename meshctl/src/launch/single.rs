//! One process of a running mesh: signalled, waited for, started again with the same arguments, added.

use mesh_proto::v1::StatusResponse;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{Group, Mesh, Node, SERVING_POLL, kill_one, node_args};
use crate::client::Client;
use crate::exit::CliError;
use crate::os::Signal;
use crate::process::End;

impl Mesh {
    /// Every process that was started and not replaced, those that have ended included.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The process of this name.
    ///
    /// # Errors
    /// [`CliError::NoSuchNode`].
    pub fn node(&self, name: &str) -> Result<&Node, CliError> {
        let found = self.nodes.iter().find(|n| n.process.name() == name);
        found.ok_or_else(|| CliError::NoSuchNode { name: name.to_owned() })
    }

    /// Asks a process to stop and waits for its end; `None` if it does not come within the grace period.
    ///
    /// # Errors
    /// [`CliError::NoSuchNode`].
    pub async fn terminate(&self, name: &str) -> Result<Option<End>, CliError> {
        self.node(name)?.process.signal(Signal::Term);
        self.ended(name).await
    }

    /// Waits for the end of a process that was asked to stop; `None` if it does not come within the grace period.
    ///
    /// # Errors
    /// [`CliError::NoSuchNode`].
    pub async fn ended(&self, name: &str) -> Result<Option<End>, CliError> {
        let process = &self.node(name)?.process;
        // Late is an answer, not a failure.
        let _ = timeout(self.launcher.args.grace, process.wait()).await;
        Ok(process.ended())
    }

    /// Kills a process and waits until it is gone.
    ///
    /// # Errors
    /// [`CliError::NoSuchNode`].
    pub async fn kill_node(&self, name: &str) -> Result<(), CliError> {
        kill_one(&self.node(name)?.process).await;
        Ok(())
    }

    /// Starts a process that has ended again, with the arguments that it had, and waits for its ready line.
    ///
    /// # Errors
    /// [`CliError`], when it is not there, still lives, or does not get ready within the start's timeout.
    pub async fn restart(&mut self, name: &str) -> Result<(), CliError> {
        let old = self.node(name)?;
        if old.process.ended().is_none() {
            return Err(CliError::StillRuns { name: name.to_owned(), pid: old.process.pid() });
        }
        let new = self.launcher.spawn(old.group, old.slot, old.args.clone())?;
        let index = self.nodes.iter().position(|n| n.process.name() == name);
        let index = index.ok_or_else(|| CliError::NoSuchNode { name: name.to_owned() })?;
        self.nodes[index] = new;
        self.get_ready(index).await
    }

    /// Adds a node under the next slot number of its group, and waits for its ready line. Its name.
    ///
    /// # Errors
    /// [`CliError`], when it cannot be started or does not get ready within the start's timeout.
    pub async fn add(&mut self, group: Group) -> Result<String, CliError> {
        let slot_max = self.nodes.iter().filter(|n| n.group == group).map(|n| n.slot).max();
        let slot = slot_max.map_or(0, |slot| slot + 1);
        let args = node_args(&self.launcher.args, &self.grpc, group, slot);
        self.nodes.push(self.launcher.spawn(group, slot, args)?);
        let index = self.nodes.len() - 1;
        self.get_ready(index).await?;
        Ok(self.nodes[index].process.name().to_owned())
    }

    async fn get_ready(&mut self, index: usize) -> Result<(), CliError> {
        let waited = self.launcher.args.start_timeout;
        let process = &mut self.nodes[index].process;
        let ready = timeout(waited, process.ready()).await;
        let late = |_| CliError::StartTimeout { waited, missing: process.name().to_owned() };
        ready.map_err(late)?.map(|_| ())
    }

    /// Waits until the mesh serves and `name` has its part in it: the router knows its process, and an expert node holds
    /// experts in the view.
    ///
    /// # Errors
    /// [`CliError::StartTimeout`] after the start's timeout.
    pub async fn joined(&self, name: &str) -> Result<(), CliError> {
        let node = self.node(name)?;
        let waited = self.launcher.args.start_timeout;
        let deadline = Instant::now() + waited;
        let poll = async {
            loop {
                // A router that was just started again may not answer yet.
                if let Ok(status) = self.status().await
                    && has_part(&status, node)
                {
                    return;
                }
                sleep(SERVING_POLL).await;
            }
        };
        let late = |_| CliError::StartTimeout { waited, missing: format!("{name} in the view") };
        timeout_at(deadline, poll).await.map_err(late)
    }

    async fn status(&self) -> Result<StatusResponse, CliError> {
        Client::connect(&self.grpc).await?.status().await
    }
}

fn has_part(status: &StatusResponse, node: &Node) -> bool {
    let known = status.nodes.iter().any(|n| n.pid == node.process.pid());
    match node.group {
        Group::Router => status.serving,
        Group::Attention => status.serving && known,
        Group::Expert => status.serving && known && (holds_experts(status, node.slot) || is_beyond_need(status)),
    }
}

fn holds_experts(status: &StatusResponse, slot: u16) -> bool {
    let experts = status.placement.iter().flat_map(|layer| &layer.experts);
    experts.flat_map(|held| &held.slots).any(|s| *s == u32::from(slot))
}

/// Whether there are more expert nodes than places to fill, so that a node may hold nothing for good.
fn is_beyond_need(status: &StatusResponse) -> bool {
    let places = |layer: &mesh_proto::v1::LayerPlacement| layer.experts.iter().map(|held| held.slots.len()).sum();
    let places_max: usize = status.placement.iter().map(places).max().unwrap_or(0);
    status.nodes.iter().filter(|n| n.role == "expert").count() > places_max
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::Launcher;
    use crate::process::Process;
    use mesh_proto::v1::{LayerPlacement, NodeStatus, Slots};
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::sync::Arc;

    /// A mesh whose every binary is a script that says that it is ready and then waits.
    fn mesh(dir: &Path) -> Mesh {
        for binary in ["expert-svc", "attention-svc", "router-svc"] {
            let path = dir.join(binary);
            let script = "#!/bin/sh\necho \"faults=$MESH_FAULTS $*\" >&2\necho '{\"ready\":\"x\"}'\nexec sleep 600\n";
            std::fs::write(&path, script).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let args = ["meshctl", "up", "--model", "m", "--experts", "2", "--start-timeout", "30", "--grace", "20"];
        let cli = <crate::cli::Cli as clap::Parser>::try_parse_from(args).unwrap();
        let crate::cli::Command::Up(mut args) = cli.command else { panic!("up") };
        args.faults = Some("delay".to_owned());
        let launcher = Launcher { args, bin_dir: dir.to_owned(), log: Arc::new(|_, _| ()) };
        Mesh { nodes: Vec::new(), launcher, grpc: "127.0.0.1:1".to_owned() }
    }

    fn args(mesh: &Mesh, name: &str) -> Vec<String> {
        mesh.node(name).unwrap().args.clone()
    }

    #[tokio::test]
    async fn nodes_are_added_in_the_next_slot_and_started_again_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let mut mesh = mesh(dir.path());
        assert_eq!(mesh.add(Group::Expert).await.unwrap(), "expert-0");
        assert_eq!(mesh.add(Group::Expert).await.unwrap(), "expert-1");
        assert_eq!(mesh.add(Group::Attention).await.unwrap(), "attention-0");
        let (pid, before) = (mesh.node("expert-0").unwrap().process.pid(), args(&mesh, "expert-0"));
        let early = mesh.restart("expert-0").await.unwrap_err();
        assert!(matches!(early, CliError::StillRuns { .. }), "{early}");

        mesh.kill_node("expert-0").await.unwrap();
        mesh.restart("expert-0").await.unwrap();
        assert_ne!(mesh.node("expert-0").unwrap().process.pid(), pid);
        assert_eq!((args(&mesh, "expert-0"), mesh.nodes().len()), (before, 3));
        assert_eq!(mesh.add(Group::Expert).await.unwrap(), "expert-2", "a number is never used twice");
        let end = mesh.terminate("expert-2").await.unwrap();
        assert!(end.is_some_and(|end| !end.status.success()));
        assert!(matches!(mesh.node("expert-7"), Err(CliError::NoSuchNode { .. })));
    }

    #[tokio::test]
    async fn faults_are_handed_to_attention_nodes_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut mesh = mesh(dir.path());
        for (group, wanted) in [(Group::Attention, "faults=delay"), (Group::Expert, "faults= ")] {
            let name = mesh.add(group).await.unwrap();
            mesh.kill_node(&name).await.unwrap();
            let process: &Process = mesh.node(&name).unwrap().process();
            assert!(process.tail()[0].starts_with(wanted), "{:?}", process.tail());
        }
    }

    #[tokio::test]
    async fn an_expert_node_has_its_part_once_it_holds_experts_or_all_are_held() {
        let dir = tempfile::tempdir().unwrap();
        let mut mesh = mesh(dir.path());
        for _ in 0..2 {
            mesh.add(Group::Expert).await.unwrap();
        }
        let node = mesh.node("expert-1").unwrap();
        let status = |slots: &[u32], nodes: usize| {
            let pid = |i: usize| if i == 0 { node.process.pid() } else { 1 };
            let role = || "expert".to_owned();
            StatusResponse {
                serving: true,
                nodes: (0..nodes).map(|i| NodeStatus { pid: pid(i), role: role(), ..Default::default() }).collect(),
                placement: vec![LayerPlacement {
                    layer: 0,
                    experts: slots.iter().map(|slot| Slots { slots: vec![*slot] }).collect(),
                }],
                ..StatusResponse::default()
            }
        };
        assert!(has_part(&status(&[0, 1], 2), node));
        assert!(!has_part(&status(&[0, 0], 2), node), "another node holds everything");
        assert!(has_part(&status(&[0, 2], 3), node), "two experts, three nodes");
        assert!(!has_part(&status(&[0, 1], 0), node), "unknown to the router");
        assert!(!has_part(&StatusResponse { serving: false, ..status(&[0, 1], 2) }, node));
    }
}
