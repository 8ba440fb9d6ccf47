//! `meshctl demo`: a mesh of seven processes on the shipped tiny model, a completion, and what its all-to-all moved.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mesh_proto::v1::generate_request::Prompt;
use mesh_proto::v1::{GenerateRequest, NodeStatus, StatusResponse};

use crate::cli::{DemoArgs, UpArgs};
use crate::client::Client;
use crate::exit::{CliError, Exit};
use crate::generate::{self, show};
use crate::launch::{Mesh, Progress};
use crate::os;
use crate::signals::StopSignals;
use crate::status::placement_text;
use crate::volume::{Measured, Volume};

/// The demo's shape: the disaggregated form, with two of eight experts on each expert node.
const ATTENTION: u16 = 2;
const EXPERTS: u16 = 4;
/// The shipped model, in the repository.
const MODEL: &str = "fixtures/tiny-moe";
/// How long the nodes' counters may take to reach the router: several heartbeats.
const COUNTERS_MAX: Duration = Duration::from_secs(30);
const COUNTERS_POLL: Duration = Duration::from_millis(50);

/// Runs the command.
///
/// # Errors
/// [`CliError`]; nothing is left running in any case.
pub async fn run(args: DemoArgs) -> Result<Exit, CliError> {
    let model = match &args.model {
        Some(model) => model.clone(),
        None => shipped_model()?,
    };
    let up = UpArgs {
        model,
        attention: ATTENTION,
        experts: EXPERTS,
        replicas: 1,
        transport: args.transport,
        dtype: None,
        grpc: ([127, 0, 0, 1], 0).into(),
        threads: None,
        no_bind: false,
        cache_dir: None,
        kv_pages: None,
        prefill_chunk: None,
        log: "error".to_owned(),
        start_timeout: Duration::from_secs(120),
        grace: Duration::from_secs(10),
        bin_dir: args.bin_dir.clone(),
        json: false,
        faults: None,
    };
    let mut signals = StopSignals::watch()?;
    let progress = Progress::new(false);
    let (mesh, line) = signals.unless(Mesh::start(&up, &progress, progress.sink())).await?;
    show(&format!("mesh of {} processes on {}\n", line.nodes.len(), mesh.grpc()))?;
    for node in &line.nodes {
        show(&format!("  {:<12} pid {:<8} {}\n", node.id, node.pid, node.addr))?;
    }

    let pids = mesh.pids();
    let outcome = signals.unless(measure(&args, mesh.grpc())).await;
    let killed = mesh.stop().await;
    outcome?;
    if !killed.is_empty() {
        return Err(CliError::Demo(format!("{} did not stop when asked and had to be killed", killed.join(", "))));
    }
    let left: Vec<&str> = pids.iter().filter(|(_, pid)| os::exists(*pid)).map(|(name, _)| name.as_str()).collect();
    if !left.is_empty() {
        return Err(CliError::Demo(format!("still running: {}", left.join(", "))));
    }
    show(&format!("all {} processes stopped, nothing is left running\n", pids.len()))?;
    Ok(Exit::Ok)
}

/// `fixtures/tiny-moe` of the repository that this directory or this executable lies in.
///
/// # Errors
/// [`CliError::NoModel`] and [`CliError::Os`].
pub(crate) fn shipped_model() -> Result<PathBuf, CliError> {
    let cwd =
        std::env::current_dir().map_err(|source| CliError::Os { what: "finding the current directory", source })?;
    let exe = crate::launch::own_folder()?;
    let places = cwd.ancestors().chain(exe.ancestors()).map(|dir: &Path| dir.join(MODEL));
    let found = places.into_iter().find(|dir| dir.join("config.json").is_file());
    found.ok_or_else(|| CliError::NoModel { path: cwd.join(MODEL) })
}

async fn measure(args: &DemoArgs, grpc: &str) -> Result<(), CliError> {
    let mut client = Client::connect(grpc).await?;
    let before = client.status().await?;
    show(&format!(
        "data plane: {}; compute: {}\n",
        distinct(&before, |n| &n.transport),
        distinct(&before, |n| &n.compute)
    ))?;
    show("placement (expert slot: its experts)\n")?;
    show(&placement_text(&before.placement))?;

    show(&format!("\n{}", args.prompt))?;
    let request = GenerateRequest {
        prompt: Some(Prompt::Text(args.prompt.clone())),
        max_new_tokens: Some(args.max_new_tokens),
        ..GenerateRequest::default()
    };
    let (asked, mut first) = (Instant::now(), None);
    let completion = generate::stream(&mut client, tonic::Request::new(request), |text| {
        first.get_or_insert_with(|| asked.elapsed());
        show(text)
    });
    let completion = completion.await?;
    let took = asked.elapsed();
    let usage = &completion.usage;
    show(&format!(
        "\n\n{} prompt tokens, {} made on attention-{} in {:.2} s: first after {:.0} ms, {:.1} tokens/s\n",
        usage.prompt_tokens,
        usage.completion_tokens,
        completion.attention_slot,
        took.as_secs_f64(),
        first.unwrap_or(took).as_secs_f64() * 1e3,
        f64::from(usage.completion_tokens) / took.as_secs_f64(),
    ))?;
    if usage.completion_tokens == 0 {
        return Err(CliError::Demo("the mesh made no token".to_owned()));
    }

    let after = counters_after(&mut client, Instant::now()).await?;
    let volume = after.model.as_ref().and_then(|m| Volume::of(m, usage.prompt_tokens, usage.completion_tokens));
    let volume =
        volume.ok_or_else(|| CliError::Demo("the mesh does not say which model and dtype it serves".to_owned()))?;
    let measured = Measured::of(&after.nodes).since(Measured::of(&before.nodes));
    show(&volume.report(measured))?;
    if measured.combine != volume.pairs_one_way() {
        let (found, wanted) = (measured.combine, volume.pairs_one_way());
        return Err(CliError::Demo(format!("combine moved {found} B where exactly {wanted} B are owed")));
    }
    Ok(())
}

/// What the nodes say of themselves, each answer once.
fn distinct(status: &StatusResponse, of: impl Fn(&NodeStatus) -> &String) -> String {
    let mut words: Vec<&str> = status.nodes.iter().map(|n| of(n).as_str()).collect();
    words.sort_unstable();
    words.dedup();
    words.join(", ")
}

/// The status once every attention node has sent a heartbeat after `since`: its counters then include the request.
async fn counters_after(client: &mut Client, since: Instant) -> Result<StatusResponse, CliError> {
    loop {
        let asked = Instant::now();
        let status = client.status().await?;
        let heard = |ms: u64| asked.checked_sub(Duration::from_millis(ms)).is_some_and(|at| at > since);
        let mut attention = status.nodes.iter().filter(|n| n.role == "attention");
        if attention.all(|n| heard(n.since_heartbeat_ms)) {
            return Ok(status);
        }
        if since.elapsed() > COUNTERS_MAX {
            let silent = status.nodes.iter().filter(|n| n.role == "attention" && !heard(n.since_heartbeat_ms));
            let silent: Vec<String> = silent.map(|n| format!("attention-{}", n.slot)).collect();
            return Err(CliError::Demo(format!("no heartbeat of {} in {COUNTERS_MAX:?}", silent.join(", "))));
        }
        tokio::time::sleep(COUNTERS_POLL).await;
    }
}
