//! The machine's limit for UCX: the same bytes through plain UCP, each end spinning for ever.

use std::time::Duration;

use mesh_transport::frame::HEADER_BYTES;
use mesh_transport::ucx::UcxOptions;
use mesh_transport::ucx::pingpong::Pingpong;

use crate::BenchError;
use crate::child::Process;
use crate::exchange::{Running, assemble};
use crate::nodes::{PATIENCE, ROWS_MAX, RoundTrip};
use crate::raw::wire_bytes;

/// How long an answering end hears nothing until the run is over: longer than a busy machine keeps the asking end from a processor.
const IDLE_MAX: Duration = Duration::from_millis(50);

fn open() -> Result<Pingpong, BenchError> {
    Pingpong::new(&UcxOptions::default(), wire_bytes(ROWS_MAX).0).map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> BenchError {
    BenchError::Other(format!("plain ucp: {error}"))
}

/// The answering end, until its input ends. It spins only while it is asked: each line of input is a time in milliseconds.
pub fn serve(say: impl Fn(&str) -> Result<(), BenchError>) -> Result<(), BenchError> {
    let mut end = open()?;
    say(&to_hex(&end.address().map_err(failed)?))?;
    let mut lines = std::io::stdin().lines();
    let peer = lines.next().transpose().map_err(BenchError::io("read the peer's address"))?;
    end.connect(&from_hex(&peer.unwrap_or_default())?).map_err(failed)?;
    for line in lines {
        line.map_err(BenchError::io("read an order"))?;
        say("ready")?;
        // The first message may be a while; silence after that is the end of the round.
        let mut patience = PATIENCE;
        while end.answer(patience).map_err(failed)? {
            patience = IDLE_MAX;
        }
        say("done")?;
    }
    Ok(())
}

/// The asking end, and the process that answers.
pub struct UcpClient {
    end: Pingpong,
    server: Process,
}

/// One asking end and one answering process.
pub fn plain() -> Result<Running, BenchError> {
    let mut server = Process::start(&["ucp-server".to_owned()])?;
    let mut end = open()?;
    end.connect(&from_hex(&server.greeting)?).map_err(failed)?;
    server.tell(&to_hex(&end.address().map_err(failed)?))?;
    assemble(vec![Box::new(UcpClient { end, server })], Vec::new())
}

impl RoundTrip for UcpClient {
    fn begin(&mut self) -> Result<(), BenchError> {
        self.server.tell("go")?;
        self.server.hear().map(|_| ())
    }

    fn round_trip(&mut self, rows: usize) -> Result<(), BenchError> {
        let (ask, answer) = wire_bytes(rows);
        match self.end.round_trip(ask - HEADER_BYTES, answer - HEADER_BYTES, PATIENCE).map_err(failed)? {
            true => Ok(()),
            false => Err(failed("the answering end is gone or silent")),
        }
    }

    fn end(&mut self) -> Result<(), BenchError> {
        self.server.hear().map(|_| ())
    }
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Result<Vec<u8>, BenchError> {
    // A sign is a number to the parser and no hexadecimal digit.
    let digits = |pair: &&str| pair.bytes().all(|digit| digit.is_ascii_hexdigit());
    let pair = |at: usize| text.get(at..at + 2).filter(digits).and_then(|pair| u8::from_str_radix(pair, 16).ok());
    let bytes: Option<Vec<u8>> = (0..text.len()).step_by(2).map(pair).collect();
    bytes.filter(|bytes| !bytes.is_empty()).ok_or_else(|| failed("the other end's address is not one"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_survives_its_way_as_text() {
        assert_eq!(from_hex(&to_hex(&[0, 1, 254, 255])).unwrap(), [0, 1, 254, 255]);
        for bad in ["", "0", "0g", "+1"] {
            assert!(from_hex(bad).is_err(), "{bad:?}");
        }
    }
}
