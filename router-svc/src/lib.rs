//! The front door and control plane of the mesh: clients call it, nodes register with it, and it issues the views.
//!
//! # Layout
//! - [`serve`]: runs a router on a listener until told to stop
//! - [`config`]: what a router is told at start, and its bounds
//! - [`membership`]: who is registered, under which slot, and for how long (no IO, no clock)
//! - [`mesh`]: the state machine of membership and two-phase views (no IO, no clock)
//! - [`load`]: load and speed out of heartbeats, which placement rests on (no IO, no clock)
//! - [`moved`]: what changes of the view had nodes load (no IO, no clock)
//! - [`choice`]: which attention node takes a request
//! - [`plane`]: the state machine at work: sessions, timer, channels to attention nodes
//! - [`control`]: the service that nodes call
//! - [`front`]: the service that clients call
//! - [`relay`]: one request's stream, with every way that it can end
//! - [`validate`]: what can be said against a request without knowing the model

#![forbid(unsafe_code)]

pub mod choice;
pub mod config;
pub mod control;
pub mod front;
pub mod load;
pub mod membership;
pub mod mesh;
pub mod moved;
pub mod plane;
pub mod relay;
mod server;
pub mod validate;

pub use config::{RouterConfig, RouterError};
pub use server::serve;
