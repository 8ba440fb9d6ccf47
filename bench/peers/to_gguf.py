#!/usr/bin/env python3
"""Writes a Qwen3-MoE checkpoint as GGUF with the same bf16 weights, for llama.cpp: to_gguf.py MODEL_DIR FILE.gguf"""

import json
import pathlib
import sys

import gguf
import torch
from safetensors import safe_open

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}


def main(model: pathlib.Path, out: pathlib.Path) -> None:
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] != "qwen3_moe" or config["mlp_only_layers"] or config["tie_word_embeddings"]:
        sys.exit(f"{model}: only Qwen3-MoE with experts in every layer and an output matrix of its own is converted")
    shards = [safe_open(file, "pt") for file in sorted(model.glob("*.safetensors"))]
    where = {name: shard for shard in shards for name in shard.keys()}

    writer = gguf.GGUFWriter(out, "qwen3moe")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])

    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokens = [f"[PAD{i}]" for i in range(config["vocab_size"])]
    kinds = [gguf.TokenType.UNUSED] * len(tokens)
    for text, at in tokenizer["model"]["vocab"].items():
        tokens[at], kinds[at] = text, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(config["eos_token_id"])

    def add(name: str, tensor: torch.Tensor) -> None:
        # Vectors and the router are kept in f32 by llama.cpp's own converter too; the values are the same.
        if tensor.dim() == 1 or name.endswith("ffn_gate_inp.weight"):
            writer.add_tensor(name, tensor.float().numpy())
        else:
            raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

    def read(name: str) -> torch.Tensor:
        return where[name].get_tensor(name)

    add("token_embd.weight", read("model.embed_tokens.weight"))
    add("output_norm.weight", read("model.norm.weight"))
    add("output.weight", read("lm_head.weight"))
    for layer in range(config["num_hidden_layers"]):
        of, to = f"model.layers.{layer}", f"blk.{layer}"
        for theirs, ours in NAMES.items():
            add(f"{to}.{ours}.weight", read(f"{of}.{theirs}.weight"))
        for part in ("gate", "up", "down"):
            names = (f"{of}.mlp.experts.{expert}.{part}_proj.weight" for expert in range(config["num_experts"]))
            add(f"{to}.ffn_{part}_exps.weight", torch.stack([read(name) for name in names]))
        print(f"layer {layer + 1} of {config['num_hidden_layers']}", file=sys.stderr)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=sys.stderr.isatty())
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
