//! Model directories by behaviour: what opens, what is refused and with which error, and text in pieces.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that cannot go on says so by panicking")]

mod configs;
mod fixtures;
mod refusals;
mod rope;
mod support;
mod tokenizers;
