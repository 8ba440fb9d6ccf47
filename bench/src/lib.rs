//! Benchmarks that print each figure beside the machine's own limit.
