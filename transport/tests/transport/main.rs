//! What every transport promises, run over each of them, and what the TCP one promises to strangers.

#![allow(missing_docs, clippy::unwrap_used)]

mod conformance;
mod support;
mod tcp_strangers;
mod ucx_cases;

use mesh_transport::TransportKind;

conformance::suite!(local, TransportKind::Local);
conformance::suite!(tcp, TransportKind::Tcp);
conformance::suite!(
    ucx,
    match ucx_cases::kind() {
        Some(kind) => kind,
        None => return,
    }
);
