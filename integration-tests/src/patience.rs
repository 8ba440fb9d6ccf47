//! How long anything may take, and waiting until something holds. Failures are found by deadlines, never by sleeping.

use std::time::{Duration, Instant};

/// How long one step of a test may take on a busy machine before it counts as hung. `MESH_TEST_PATIENCE` (seconds) sets
/// it for slower ones.
pub fn patience() -> Duration {
    let seconds = std::env::var("MESH_TEST_PATIENCE").ok().and_then(|s| s.parse().ok());
    Duration::from_secs(seconds.unwrap_or(180))
}

/// Completes within [`patience`] or panics with `what`.
pub async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(patience(), work).await {
        Ok(done) => done,
        Err(_) => panic!("{what}: not done after {:?}", patience()),
    }
}

/// Tries `check` until it is `Ok`, or panics with its last words when [`patience`] is out.
pub async fn eventually<T, F: Future<Output = Result<T, String>>>(what: &str, mut check: impl FnMut() -> F) -> T {
    let start = Instant::now();
    loop {
        match check().await {
            Ok(value) => return value,
            Err(why) if start.elapsed() > patience() => panic!("{what}: still not after {:?}: {why}", patience()),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}
