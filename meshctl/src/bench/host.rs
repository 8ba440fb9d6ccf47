//! What the load ran on: the machine, and the processor time of processes on it, from `/proc`.
//!
//! Where a figure cannot be read (another system, a process of another machine) it is absent, never zero.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};

use mesh_proto::v1::StatusResponse;
use serde::Serialize;

/// Ticks of a second in `/proc/PID/stat`: part of the kernel's interface (USER_HZ), 100 on every platform of Rust's.
const TICKS_PER_SECOND: f64 = 100.0;
/// Names of the mesh's programs as the kernel shortens them, which tell its processes from strangers with their pid.
const PROGRAMS: [&str; 4] = ["router-svc", "attention-svc", "expert-svc", "local-mesh"];

/// The machine that the load came from.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: Option<String>,
    /// Logical processors that this process may use.
    pub processors: Option<usize>,
    /// Memory, bytes.
    pub memory_bytes: Option<u64>,
    /// The kernel.
    pub kernel: Option<String>,
    /// Architecture and system of the build.
    pub platform: String,
}

impl Machine {
    /// This one.
    pub fn here() -> Self {
        let read = |path| fs::read_to_string(path).ok();
        let cpuinfo = read("/proc/cpuinfo");
        let meminfo = read("/proc/meminfo");
        Self {
            cpu: cpuinfo.as_deref().and_then(|text| field(text, "model name")).map(str::to_owned),
            processors: std::thread::available_parallelism().ok().map(usize::from),
            memory_bytes: meminfo.as_deref().and_then(|text| field(text, "MemTotal")).and_then(kibibytes),
            kernel: read("/proc/sys/kernel/osrelease").map(|text| text.trim().to_owned()),
            platform: format!("{} {}", std::env::consts::ARCH, std::env::consts::OS),
        }
    }
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = text.lines().filter_map(|line| line.split_once(':'));
    fields.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim())
}

fn kibibytes(value: &str) -> Option<u64> {
    value.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Processor time of a process, user and system, seconds; exact to 10 ms.
pub fn cpu_seconds(stat: &str) -> Option<f64> {
    // The name stands in parentheses and may have any character; what counts comes after the last one.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    let user: u64 = fields.nth(11)?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((user + system) as f64 / TICKS_PER_SECOND)
}

fn cpu_of(pid: &str) -> Option<f64> {
    cpu_seconds(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Processor time of this process.
pub fn own_cpu() -> Option<f64> {
    cpu_of("self")
}

/// The mesh's processes on this machine, by pid, with the names of the nodes in them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MeshProcesses(BTreeMap<u32, Vec<String>>);

impl MeshProcesses {
    /// Those that the status names and, where the front door is on this machine, the one that listens there. A pid of
    /// another machine is left out unless a program of the mesh has it here by chance.
    pub fn find(status: &StatusResponse, grpc: &str) -> Self {
        let mut found: BTreeMap<u32, Vec<String>> = BTreeMap::new();
        for node in &status.nodes {
            if is_program(node.pid) {
                found.entry(node.pid).or_default().push(format!("{}-{}", node.role, node.slot));
            }
        }
        let router = loopback_port(grpc).and_then(listener).filter(|pid| is_program(*pid));
        if let Some(pid) = router {
            found.entry(pid).or_default().insert(0, "router".to_owned());
        }
        Self(found)
    }

    /// Processor time of each, by its nodes' names; what is gone is left out.
    pub fn cpu(&self) -> BTreeMap<String, f64> {
        let each = self.0.iter().filter_map(|(pid, names)| Some((names.join("+"), cpu_of(&pid.to_string())?)));
        each.collect()
    }
}

fn is_program(pid: u32) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm"));
    name.is_ok_and(|name| PROGRAMS.contains(&name.trim()))
}

/// The port of an address on this machine's loopback.
fn loopback_port(grpc: &str) -> Option<u16> {
    let addr = grpc.rsplit_once("//").map_or(grpc, |(_, addr)| addr).trim_end_matches('/');
    if let Ok(addr) = addr.parse::<SocketAddr>() {
        return addr.ip().is_loopback().then_some(addr.port());
    }
    let (host, port) = addr.rsplit_once(':')?;
    let port = port.parse().ok()?;
    (host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())).then_some(port)
}

/// The process that listens on a TCP port, as far as this user may look.
fn listener(port: u16) -> Option<u32> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| fs::read_to_string(path).unwrap_or_default());
    let inode = tables.iter().find_map(|table| listening_inode(table, port))?;
    let link = format!("socket:[{inode}]");
    let pids = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.into_iter().find(|pid: &u32| {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        files.into_iter().any(|file| fs::read_link(file.path()).is_ok_and(|to| to.as_os_str() == link.as_str()))
    })
}

/// The inode of the socket in state LISTEN on a port, in the format of `/proc/net/tcp`.
fn listening_inode(table: &str, port: u16) -> Option<u64> {
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (_, local_port) = fields.get(1)?.rsplit_once(':')?;
        let listens = *fields.get(3)? == "0A" && u16::from_str_radix(local_port, 16) == Ok(port);
        if listens { fields.get(9)?.parse().ok() } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_read_past_any_process_name() {
        let stat = "42 (a) b) c) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 100 1 1";
        assert_eq!(cpu_seconds(stat), Some(3.0));
        assert_eq!(cpu_seconds("42 (a"), None);
        assert_eq!(cpu_seconds(""), None);
    }

    #[test]
    fn this_process_uses_processor_time() {
        let before = own_cpu().unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while own_cpu().unwrap() <= before {
            assert!(std::time::Instant::now() < end, "no processor time in a minute");
        }
    }

    #[test]
    fn a_listener_is_found_by_its_port() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        assert_eq!(listener(port), Some(std::process::id()));
        assert_eq!(loopback_port(&format!("127.0.0.1:{port}")), Some(port));
    }

    #[test]
    fn only_loopback_is_this_machine() {
        assert_eq!(loopback_port("http://localhost:5/"), Some(5));
        assert_eq!(loopback_port("[::1]:6"), Some(6));
        assert_eq!(loopback_port("10.0.0.1:7"), None);
        assert_eq!(loopback_port("mesh.example:7"), None);
    }

    #[test]
    fn only_listening_sockets_count() {
        let table = "  sl  local rem st\n   0: 0100007F:1F90 0:0 01 0:0 0:0 0 0 0 11\n   1: 0100007F:1F90 0:0 0A 0:0 0:0 0 0 0 12\n";
        assert_eq!(listening_inode(table, 8080), Some(12));
        assert_eq!(listening_inode(table, 8081), None);
    }

    #[test]
    fn a_stranger_with_a_nodes_pid_is_not_counted() {
        let mut status = StatusResponse::default();
        status.nodes.push(mesh_proto::v1::NodeStatus { pid: std::process::id(), ..Default::default() });
        assert_eq!(MeshProcesses::find(&status, "10.0.0.1:1"), MeshProcesses::default());
    }

    #[test]
    fn the_machine_is_told() {
        let machine = Machine::here();
        assert!(machine.processors.unwrap() >= 1 && machine.memory_bytes.unwrap() > 1 << 20, "{machine:?}");
    }
}
