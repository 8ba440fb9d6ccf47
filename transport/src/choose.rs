//! Which backend a node takes, and why not the faster one.

use std::fmt;
use std::str::FromStr;

use crate::TransportKind;

/// What a node is asked to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransportChoice {
    /// UCX where the machine has it, else TCP.
    #[default]
    Auto,
    /// Queues inside one process.
    Local,
    /// TCP.
    Tcp,
    /// UCX; an error where the machine lacks it.
    Ucx,
}

impl FromStr for TransportChoice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "auto" => Ok(TransportChoice::Auto),
            "local" => Ok(TransportChoice::Local),
            "tcp" => Ok(TransportChoice::Tcp),
            "ucx" => Ok(TransportChoice::Ucx),
            _ => Err(format!("{name:?} is no transport; there are auto, local, tcp and ucx")),
        }
    }
}

impl fmt::Display for TransportChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            TransportChoice::Auto => "auto",
            TransportChoice::Local => "local",
            TransportChoice::Tcp => "tcp",
            TransportChoice::Ucx => "ucx",
        })
    }
}

/// What a node takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The backend.
    pub kind: TransportKind,
    /// Why it is not the faster one: what was asked for, or what is missing. `None` when there is no faster one.
    pub why_not_faster: Option<String>,
}

/// Chooses the backend, and logs the choice.
pub fn choose(requested: TransportChoice) -> Choice {
    let choice = weigh(requested, crate::open::ucx_missing);
    match &choice.why_not_faster {
        Some(why) => tracing::info!(transport = %choice.kind, why_not_faster = %why, "transport chosen"),
        None => tracing::info!(transport = %choice.kind, "transport chosen"),
    }
    choice
}

fn weigh(requested: TransportChoice, ucx_missing: impl FnOnce() -> Option<String>) -> Choice {
    let (kind, why_not_faster) = match requested {
        TransportChoice::Local => (TransportKind::Local, None),
        TransportChoice::Ucx => (TransportKind::Ucx, None),
        TransportChoice::Tcp => (TransportKind::Tcp, Some("tcp was asked for".to_owned())),
        TransportChoice::Auto => match ucx_missing() {
            None => (TransportKind::Ucx, None),
            missing => (TransportKind::Tcp, missing),
        },
    };
    Choice { kind, why_not_faster }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_and_strangers_are_refused_with_the_names_there_are() {
        for choice in [TransportChoice::Auto, TransportChoice::Local, TransportChoice::Tcp, TransportChoice::Ucx] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert!("quic".parse::<TransportChoice>().unwrap_err().contains("auto, local, tcp and ucx"));
    }

    #[test]
    fn what_is_asked_for_is_taken_and_auto_says_why_it_took_less() {
        let missing = || Some("no libucp".to_owned());
        assert_eq!(weigh(TransportChoice::Ucx, missing).kind, TransportKind::Ucx);
        assert_eq!(weigh(TransportChoice::Local, missing).kind, TransportKind::Local);
        let tcp = weigh(TransportChoice::Tcp, || None);
        assert!(tcp.kind == TransportKind::Tcp && tcp.why_not_faster.is_some());
        let auto = weigh(TransportChoice::Auto, missing);
        assert_eq!(auto, Choice { kind: TransportKind::Tcp, why_not_faster: missing() });
        assert_eq!(weigh(TransportChoice::Auto, || None), Choice { kind: TransportKind::Ucx, why_not_faster: None });
    }
}
