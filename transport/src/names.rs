//! From `host:port` to a connected socket, in bounded time.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The least that an address is tried for, as a timeout of zero would be refused.
const TRY_MIN: Duration = Duration::from_millis(1);

/// Connects to `at` (`host:port`, the host a name or an address) before `deadline`. Of several addresses each has its
/// share of the time, so that one which swallows everything does not keep the next from being tried.
///
/// # Errors
/// [`ErrorKind::TimedOut`] at the deadline, [`ErrorKind::InvalidInput`] when `at` has no such form, else what the system
/// says.
pub fn dial(at: &str, deadline: Instant) -> io::Result<TcpStream> {
    let addresses = resolve(at, deadline)?;
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for (tried, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        let share = left / (addresses.len() - tried) as u32;
        match TcpStream::connect_timeout(address, share.max(TRY_MIN)) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The addresses of `at`. The system's resolver knows no deadline: it is asked on a thread of its own, which is left
/// behind when it takes too long and ends when the resolver gives up.
fn resolve(at: &str, deadline: Instant) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = at.parse() {
        return Ok(vec![address]);
    }
    let (tell, told) = mpsc::sync_channel(1);
    let name = at.to_owned();
    std::thread::Builder::new().name("resolve".into()).spawn(move || {
        // Nobody listens any more when the deadline has passed.
        let _unheard = tell.send(name.to_socket_addrs().map(Iterator::collect));
    })?;
    let left = deadline.saturating_duration_since(Instant::now());
    told.recv_timeout(left).unwrap_or_else(|_| {
        Err(io::Error::new(ErrorKind::TimedOut, format!("the name was not resolved within {left:?}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    #[test]
    fn names_and_addresses_lead_to_the_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        for host in ["127.0.0.1", "localhost"] {
            let stream = dial(&format!("{host}:{port}"), soon()).unwrap();
            assert_eq!(stream.peer_addr().unwrap().port(), port);
        }
    }

    #[test]
    fn what_is_no_address_and_what_is_too_late_are_told_apart() {
        assert_eq!(dial("localhost", soon()).unwrap_err().kind(), ErrorKind::InvalidInput);
        let now = Instant::now();
        for at in ["localhost:1", "127.0.0.1:1"] {
            assert_eq!(dial(at, now).unwrap_err().kind(), ErrorKind::TimedOut, "{at}");
        }
    }
}
