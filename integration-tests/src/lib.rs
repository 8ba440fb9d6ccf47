//! The mesh from outside: a harness and cases by behaviour.
