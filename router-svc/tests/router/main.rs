//! A router on loopback with nodes made of the test's own words.

mod harness;
mod process;
mod registration;
mod requests;
mod views;
