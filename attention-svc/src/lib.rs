//! Attention nodes: scheduler, KV cache, layer loop, exchange, sampling.
