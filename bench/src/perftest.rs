//! `ucx_perftest`, UCX's own measure of itself, where it is installed.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = "ucx_perftest";

/// How long one measurement may take.
const TIME_MAX: Duration = Duration::from_secs(4);

/// Twice the median one-way latency of active messages of `bytes`, in microseconds: what a round trip costs UCX itself,
/// spinning and never asleep. `None` when the program is missing or fails.
pub fn round_trip_us(bytes: usize, iterations: usize) -> Option<f64> {
    let port = std::net::TcpListener::bind("127.0.0.1:0").ok()?.local_addr().ok()?.port().to_string();
    let quiet = |command: &mut Command| command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().ok().map(Running);
    let mut server = quiet(Command::new(PROGRAM).args(["-p", &port]).stdout(Stdio::null()))?;
    wait_until_listening(&port, &mut server)?;
    let (size, count) = (bytes.to_string(), iterations.to_string());
    let args = ["127.0.0.1", "-p", &port, "-t", "ucp_am_lat", "-s", &size, "-n", &count, "-w", "100", "-f"];
    let mut client = quiet(Command::new(PROGRAM).args(args).stdout(Stdio::piped()))?;
    client.ended(Instant::now() + TIME_MAX)?;
    let mut output = String::new();
    std::io::Read::read_to_string(client.0.stdout.as_mut()?, &mut output).ok()?;
    parse(&output).map(|one_way| 2.0 * one_way)
}

/// The median latency out of the final line: iterations, median, average, overall, then rates.
fn parse(output: &str) -> Option<f64> {
    output.lines().rev().find_map(|line| {
        let numbers: Vec<f64> =
            line.trim_start_matches("Final:").split_whitespace().map_while(|w| w.parse().ok()).collect();
        if numbers.len() >= 4 { Some(numbers[1]) } else { None }
    })
}

/// The server takes one connection for its whole life, so it cannot be tried: its socket is looked up instead.
fn wait_until_listening(port: &str, server: &mut Running) -> Option<()> {
    let hex = format!(":{:04X} 00000000:0000 0A", port.parse::<u16>().ok()?);
    let deadline = Instant::now() + TIME_MAX;
    while Instant::now() < deadline {
        if std::fs::read_to_string("/proc/net/tcp").ok()?.contains(&hex) {
            return Some(());
        }
        if server.0.try_wait().ok()?.is_some() {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

/// A process that is ended, by its id, when dropped.
struct Running(Child);

impl Running {
    fn ended(&mut self, deadline: Instant) -> Option<()> {
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait().ok()? {
                return status.success().then_some(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_second_number_of_the_last_line() {
        let output = "+--------------+\n|     Test     | # iterations |\n+-----+\n\
                      \x20                      20000      0.891    16.666    16.666      238.04     238.04       60001       60001\n";
        assert_eq!(parse(output), Some(0.891));
        let newer = "Final:                 20000      0.500     1.000     1.000      238.04     238.04       60001       60001\n";
        assert_eq!(parse(newer), Some(0.5));
        assert_eq!(parse("no such test\n"), None);
    }
}
