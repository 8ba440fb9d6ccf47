//! A router on loopback with nodes made of the test's own words.

// A test that cannot go on must panic, helpers of tests included.
#![allow(clippy::unwrap_used)]

mod harness;
mod members;
mod process;
mod registration;
mod requests;
mod views;
