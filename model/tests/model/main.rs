//! Model directories by behaviour: what opens, what is refused and with which error, and text in pieces.

mod configs;
mod fixtures;
mod refusals;
mod rope;
mod support;
mod tokenizers;
