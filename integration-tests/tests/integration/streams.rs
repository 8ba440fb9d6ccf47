//! Many streams at once, some cancelled midway: nothing hangs and nothing is held afterwards.

use std::time::Duration;

use integration_tests::generation::generate;
use integration_tests::mesh::ucx_missing;
use integration_tests::patience::soon;
use integration_tests::{Mesh, Transport, ids_request};
use mesh_proto::v1::mesh_client::MeshClient;
use mesh_proto::{Code, MeshError};
use tokio::task::JoinSet;
use tonic::transport::Channel;

const STREAMS: u32 = 64;
const TOKENS: u32 = 40;

fn prompt(stream: u32) -> Vec<u32> {
    (0..1 + stream % 37).map(|i| 100 + (stream * 13 + i * 7) % 1900).collect()
}

/// Reads a few messages and goes away.
async fn cancel_midway(mut client: MeshClient<Channel>, stream: u32) -> Result<u32, MeshError> {
    let failed = |status| MeshError::from_status(&status);
    let request = ids_request(&prompt(stream), 200);
    let mut messages = client.generate(request).await.map_err(failed)?.into_inner();
    for _ in 0..3 + stream % 5 {
        messages.message().await.map_err(failed)?.expect("200 tokens are more than a few messages");
    }
    Ok(0)
}

async fn finish(client: MeshClient<Channel>, stream: u32) -> Result<u32, MeshError> {
    let answer = generate(client, ids_request(&prompt(stream), TOKENS)).await?;
    Ok(u32::try_from(answer.tokens.len()).expect("few tokens"))
}

async fn a_quarter_cancelled(mesh: &Mesh) {
    let mut streams = JoinSet::new();
    for stream in 0..STREAMS {
        let client = mesh.client();
        if stream % 4 == 1 {
            streams.spawn(cancel_midway(client, stream));
        } else {
            streams.spawn(finish(client, stream));
        }
    }
    let mut made = 0;
    while let Some(done) = soon("a stream", streams.join_next()).await {
        made += done.expect("no panic").unwrap_or_else(|e| panic!("{e}\n{}", mesh.log()));
    }
    assert_eq!(made, STREAMS * 3 / 4 * TOKENS, "tokens of the streams that were not cancelled");
    mesh.assert_idle().await;
}

#[tokio::test]
async fn cancelled_streams_leave_nothing_behind_over_tcp() {
    let mesh = Mesh::builder().attention(2).experts(3).transport(Transport::Tcp).start().await;
    for _ in 0..2 {
        a_quarter_cancelled(&mesh).await;
    }
}

#[tokio::test]
async fn cancelled_streams_leave_nothing_behind_in_one_process() {
    a_quarter_cancelled(&Mesh::builder().attention(2).experts(3).start().await).await;
}

#[tokio::test]
async fn cancelled_streams_leave_nothing_behind_over_ucx() {
    if ucx_missing("cancelled streams").await.is_none() {
        a_quarter_cancelled(&Mesh::builder().attention(2).experts(3).transport(Transport::Ucx).start().await).await;
    }
}

// Every frame is held back, so that no processor is fast enough for the deadline; which is long, as a client of gRPC calls
// a request cancelled, by a clock of its own, that did not begin to be answered in time.
#[tokio::test]
async fn a_deadline_ends_a_request_with_its_own_error_and_frees_it() {
    let mesh = Mesh::builder().flag("--faults", "delay=1:1ms-2ms").start().await;
    let mut client = mesh.client();
    let mut request = tonic::Request::new(ids_request(&[100], 900));
    request.set_timeout(Duration::from_secs(1));
    let outcome = soon("the deadline", async {
        let mut messages = client.generate(request).await?.into_inner();
        while messages.message().await?.is_some() {}
        Ok::<(), tonic::Status>(())
    });
    let error = MeshError::from_status(&outcome.await.expect_err("900 times four layers take longer than a second"));
    assert_eq!(error.code, Code::Deadline, "{error}");
    mesh.assert_idle().await;
}

#[tokio::test]
async fn a_mesh_with_few_kv_pages_serves_everyone_in_turn_or_refuses() {
    let mesh = Mesh::builder().kv_pages(8).start().await;
    let mut streams = JoinSet::new();
    for stream in 0..STREAMS {
        streams.spawn(finish(mesh.client(), stream));
    }
    let (mut served, mut refused) = (0, 0);
    while let Some(done) = soon("a stream", streams.join_next()).await {
        match done.expect("no panic") {
            Ok(tokens) => {
                assert_eq!(tokens, TOKENS);
                served += 1;
            }
            Err(error) => {
                assert_eq!(error.code, Code::Overloaded, "{error}");
                refused += 1;
            }
        }
    }
    assert!(served > 0, "all {refused} were refused");
    mesh.assert_idle().await;
}
