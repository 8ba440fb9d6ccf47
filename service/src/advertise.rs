//! Under which address others reach a node. What it is bound to is no answer when that is every address of its machine.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use crate::ServiceError;

/// How long this machine's own name may take to be resolved.
const RESOLVE_MAX: Duration = Duration::from_secs(5);
/// The longest host name that DNS carries.
const NAME_BYTES_MAX: usize = 253;
/// Where the system says what this machine (or container) is called.
const OWN_NAME: &str = "/proc/sys/kernel/hostname";

/// A host name or IP address, without scheme and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host(String);

/// Why a text names no host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// Every address of a machine.
    #[error("{0} is every address of a machine and leads to none; name one of them, or a host name")]
    Unspecified(IpAddr),
    /// Neither a name nor an address.
    #[error("{0:?} is no host name and no IP address; leave scheme and port out, as in expert-7.mesh or 10.0.0.7")]
    NoHost(String),
}

impl FromStr for Host {
    type Err = HostError;

    fn from_str(text: &str) -> Result<Self, HostError> {
        let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        match bare.parse::<IpAddr>() {
            Ok(ip) if ip.is_unspecified() => Err(HostError::Unspecified(ip)),
            Ok(IpAddr::V6(ip)) => Ok(Self(format!("[{ip}]"))),
            Ok(IpAddr::V4(ip)) => Ok(Self(ip.to_string())),
            Err(_) if is_name(text) => Ok(Self(text.to_owned())),
            Err(_) => Err(HostError::NoHost(text.to_owned())),
        }
    }
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether `text` can be a host name. Underscores are no part of those, but container engines make names with them.
fn is_name(text: &str) -> bool {
    let label = |l: &str| !l.is_empty() && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    text.len() <= NAME_BYTES_MAX && text.strip_suffix('.').unwrap_or(text).split('.').all(label)
}

/// The host under which others reach a node that listens at `listen`: the one `given`; else this machine's own name
/// when `listen` is every address of it; else `None`, which is the one in `listen`.
///
/// # Errors
/// [`ServiceError::NoAddress`] when the machine's name is needed and leads nowhere.
pub async fn host(listen: &str, given: Option<&Host>) -> Result<Option<Host>, ServiceError> {
    match given {
        Some(given) => Ok(Some(given.clone())),
        None if is_everywhere(listen) => own_name(listen).await.map(Some),
        None => Ok(None),
    }
}

/// `bound` (`scheme://address:port`) with `host` in the address's place.
pub fn address(bound: &str, host: Option<&Host>) -> String {
    let (Some(host), Some((scheme, at))) = (host, bound.split_once("://")) else { return bound.to_owned() };
    match at.parse::<SocketAddr>() {
        Ok(at) => format!("{scheme}://{host}:{}", at.port()),
        // A place within this process, which only this process reaches.
        Err(_) => bound.to_owned(),
    }
}

fn is_everywhere(listen: &str) -> bool {
    let at = listen.split_once("://").map_or(listen, |(_, at)| at);
    at.parse::<SocketAddr>().is_ok_and(|at| at.ip().is_unspecified())
}

async fn own_name(listen: &str) -> Result<Host, ServiceError> {
    let no = |reason: String| ServiceError::NoAddress { listen: listen.to_owned(), reason };
    let name = std::fs::read_to_string(OWN_NAME).map_err(|e| no(format!("it has no name ({OWN_NAME}: {e})")))?;
    let name: Host = name.trim().parse().map_err(|e: HostError| no(format!("its name cannot be used: {e}")))?;
    let found = tokio::time::timeout(RESOLVE_MAX, tokio::net::lookup_host(format!("{name}:0"))).await;
    let found = found.map_err(|_| no(format!("its name {name} was not resolved within {RESOLVE_MAX:?}")))?;
    match found.map(|mut addresses| addresses.next()) {
        Ok(Some(_)) => Ok(name),
        Ok(None) => Err(no(format!("its name {name} has no address"))),
        Err(error) => Err(no(format!("its name {name} does not resolve: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<String, HostError> {
        text.parse::<Host>().map(|host| host.to_string())
    }

    #[test]
    fn names_and_addresses_are_hosts_and_nothing_else_is() {
        for (text, host) in [
            ("expert-7", "expert-7"),
            ("mesh_expert_1.mesh_default", "mesh_expert_1.mesh_default"),
            ("node.example.org.", "node.example.org."),
            ("10.0.0.7", "10.0.0.7"),
            ("fe80::1", "[fe80::1]"),
            ("[::1]", "[::1]"),
        ] {
            assert_eq!(parsed(text).as_deref(), Ok(host), "{text}");
        }
        let long = "a.".repeat(NAME_BYTES_MAX);
        for text in ["", ".", "a..b", "host:80", "http://host", "host/path", "a b", "[host]", "::1:x", &long] {
            assert_eq!(parsed(text), Err(HostError::NoHost(text.to_owned())), "{text}");
        }
        for text in ["0.0.0.0", "::", "[::]"] {
            assert!(matches!(parsed(text), Err(HostError::Unspecified(_))), "{text}");
        }
    }

    #[test]
    fn the_host_is_put_into_the_place_of_the_bound_address() {
        let named = |bound: &str, host: &str| address(bound, Some(&host.parse().unwrap()));
        assert_eq!(named("tcp://0.0.0.0:4711", "expert-7"), "tcp://expert-7:4711");
        assert_eq!(named("ucx://[::]:4711", "fe80::1"), "ucx://[fe80::1]:4711");
        assert_eq!(named("http://127.0.0.1:1", "10.0.0.7"), "http://10.0.0.7:1");
        assert_eq!(named("local://expert-0", "10.0.0.7"), "local://expert-0", "nobody else can go there");
        assert_eq!(address("tcp://127.0.0.1:1", None), "tcp://127.0.0.1:1");
    }

    #[tokio::test]
    async fn what_is_given_wins_and_a_bound_address_is_its_own_host() {
        let given: Host = "expert-7".parse().unwrap();
        for listen in ["0.0.0.0:0", "127.0.0.1:0"] {
            assert_eq!(host(listen, Some(&given)).await.unwrap().as_ref(), Some(&given));
        }
        for listen in ["127.0.0.1:0", "[::1]:7", "tcp://10.0.0.7:1", "localhost:0", "expert-0"] {
            assert_eq!(host(listen, None).await.unwrap(), None, "{listen}");
        }
    }

    #[tokio::test]
    async fn every_address_is_told_as_the_machines_name_or_refused_with_a_remedy() {
        for listen in ["0.0.0.0:0", "[::]:7000", "tcp://0.0.0.0:0"] {
            match host(listen, None).await {
                Ok(own) => assert_ne!(own, None, "{listen}"),
                Err(error) => {
                    let words = error.to_string();
                    assert!(words.contains(listen) && words.contains("--advertise"), "{words}");
                }
            }
        }
    }
}
