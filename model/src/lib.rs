//! Hugging Face checkpoints as typed shards: config, safetensors, tokenizer.
