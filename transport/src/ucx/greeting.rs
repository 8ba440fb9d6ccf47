//! What the two ends of a UCX channel tell each other in the handshake: where they are, and by what name to call.

use super::inbox::Token;

/// Version of this blob; two nodes of different versions do not talk.
const VERSION: u8 = 7;
/// Bytes before the worker's addresses.
const FIXED_BYTES: usize = 1 + 16 + 8 + 2;
/// The longest worker address that is accepted. UCX's grow with the number of network devices: 100 to 1000 bytes.
pub const ADDRESS_BYTES_MAX: usize = 4096;

/// One end of a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// The running kernel and the namespaces on it, so that the ends know whether they can share memory.
    pub host: [u8; 16],
    /// What its peer must name the channel.
    pub token: Token,
    /// Its worker, over anything.
    pub address: Vec<u8>,
    /// The same over the network alone.
    pub network_address: Vec<u8>,
}

impl Greeting {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(&self.host);
        bytes.extend_from_slice(&self.token.0.to_le_bytes());
        // What does not fit is longer than the other end would take in any case.
        bytes.extend_from_slice(&u16::try_from(self.address.len()).unwrap_or(u16::MAX).to_le_bytes());
        bytes.extend_from_slice(&self.address);
        bytes.extend_from_slice(&self.network_address);
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let Some((fixed, addresses)) = bytes.split_first_chunk::<FIXED_BYTES>() else {
            return Err(format!("a UCX greeting of {} bytes", bytes.len()));
        };
        if fixed[0] != VERSION {
            return Err(format!("a UCX greeting of version {} where this node speaks {VERSION}", fixed[0]));
        }
        let (mut host, mut token) = ([0; 16], [0; 8]);
        host.copy_from_slice(&fixed[1..17]);
        token.copy_from_slice(&fixed[17..25]);
        let address_bytes = usize::from(u16::from_le_bytes([fixed[25], fixed[26]]));
        let (address, network_address) = addresses.split_at_checked(address_bytes).unwrap_or_default();
        if [address, network_address].iter().any(|a| a.is_empty() || a.len() > ADDRESS_BYTES_MAX) {
            return Err(format!("UCX addresses of {address_bytes} bytes in {}", addresses.len()));
        }
        let token = Token(u64::from_le_bytes(token));
        Ok(Self { host, token, address: address.to_owned(), network_address: network_address.to_owned() })
    }

    /// Whether it can share memory with `other`.
    pub fn shares_host_with(&self, other: &Greeting) -> bool {
        self.host == other.host
    }

    /// Where `other` finds this end.
    pub fn address_for(self, other: &Greeting) -> Vec<u8> {
        if self.shares_host_with(other) { self.address } else { self.network_address }
    }
}

/// What tells this running kernel, and on it the processes that can share memory, from every other; all zero where the
/// system does not say, which matches itself only on machines that do not say either, and then UCX finds out on its own
/// that memory cannot be shared.
///
/// UCX opens a peer's memory by the peer's process number and wakes it over a socket whose name is the network
/// namespace's: two containers that share memory alone would wait for each other forever.
pub fn host() -> [u8; 16] {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = |kind| std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap_or_default();
    let [processes, network] = ["pid", "net"].map(|kind| namespace(kind).to_string_lossy().into_owned());
    host_of(&boot, &processes, &network)
}

/// The kernel's `boot` id (32 hexadecimal digits), and in each of its halves a namespace (as in `pid:[4026531836]`).
fn host_of(boot: &str, processes: &str, network: &str) -> [u8; 16] {
    let digits: Vec<u8> = boot.chars().filter_map(|c| c.to_digit(16)).map(|digit| digit as u8).collect();
    let mut host = [0; 16];
    for (byte, pair) in host.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    for (half, namespace) in host.chunks_exact_mut(8).zip([processes, network]) {
        let number: String = namespace.chars().filter(char::is_ascii_digit).collect();
        let number: u64 = number.parse().unwrap_or_default();
        half.iter_mut().zip(number.to_le_bytes()).for_each(|(byte, with)| *byte ^= with);
    }
    host
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greeting() -> Greeting {
        let (address, network_address) = (vec![1, 2, 3], vec![4, 5]);
        Greeting { host: host(), token: Token(0x1234_5678_9abc_def0), address, network_address }
    }

    #[test]
    fn it_reads_back_what_was_written() {
        assert_eq!(Greeting::decode(&greeting().encode()).unwrap(), greeting());
    }

    #[test]
    fn every_truncation_and_every_overlong_address_is_refused() {
        let bytes = greeting().encode();
        for cut in 0..=FIXED_BYTES + 3 {
            assert!(Greeting::decode(&bytes[..cut]).is_err());
        }
        let long = vec![0; ADDRESS_BYTES_MAX + 1];
        for overlong in [
            Greeting { address: long.clone(), ..greeting() },
            Greeting { network_address: long, ..greeting() },
            Greeting { address: vec![0; 1 << 17], ..greeting() },
        ] {
            assert!(Greeting::decode(&overlong.encode()).is_err());
        }
        let mut newer = bytes;
        newer[0] += 1;
        assert!(Greeting::decode(&newer).unwrap_err().contains(&format!("version {}", VERSION + 1)));
    }

    #[test]
    fn only_ends_of_one_host_find_each_other_over_shared_memory() {
        let elsewhere = Greeting { host: [9; 16], ..greeting() };
        assert_eq!(greeting().address_for(&greeting()), [1, 2, 3]);
        assert_eq!(greeting().address_for(&elsewhere), [4, 5]);
        assert_eq!(elsewhere.address_for(&greeting()), [4, 5]);
    }

    #[test]
    fn another_kernel_and_another_container_are_other_hosts() {
        let (boot, other_boot) = ("4ad1e9d8-9a4c-4a3b-8d1e-0b6c6f6c0001", "4ad1e9d8-9a4c-4a3b-8d1e-0b6c6f6c0002");
        let (pid, other_pid) = ("pid:[4026531836]", "pid:[4026532277]");
        let (net, other_net) = ("net:[4026531840]", "net:[4026532280]");
        let here = host_of(boot, pid, net);
        assert_eq!(here, host_of(boot, pid, net));
        for other in [(boot, other_pid, net), (boot, pid, other_net), (other_boot, pid, net)] {
            assert_ne!(here, host_of(other.0, other.1, other.2), "{other:?}");
        }
        assert_eq!(host_of("", "", ""), [0; 16], "a system that does not say");
    }
}
