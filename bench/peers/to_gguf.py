#!/usr/bin/env python3
"""Writes a Qwen3-MoE checkpoint as GGUF with the same bf16 weights, for llama.cpp: to_gguf.py MODEL_DIR FILE.gguf"""

import json
import pathlib
import sys

import gguf
import numpy

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


def tensors(file: pathlib.Path) -> dict[str, numpy.ndarray]:
    """The bf16 tensors of a safetensors file, mapped, as 16-bit integers: numpy has no type for them."""
    with file.open("rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(header_bytes))
    found = {}
    for name, of in header.items():
        if name == "__metadata__":
            continue
        if of["dtype"] != "BF16":
            sys.exit(f"{file}: {name} is {of['dtype']}; only bf16 is converted")
        begin = 8 + header_bytes + of["data_offsets"][0]
        found[name] = numpy.memmap(file, "<u2", "r", begin, tuple(of["shape"]))
    return found


def main(model: pathlib.Path, out: pathlib.Path) -> None:
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] != "qwen3_moe" or config["mlp_only_layers"] or config["tie_word_embeddings"]:
        sys.exit(f"{model}: only Qwen3-MoE with experts in every layer and an output matrix of its own is converted")
    weights = {name: of for file in sorted(model.glob("*.safetensors")) for name, of in tensors(file).items()}

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

    def add(name: str, tensor: numpy.ndarray) -> None:
        # Vectors and the router are kept in f32 by llama.cpp's own converter too; the values are the same.
        if tensor.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
            writer.add_tensor(name, (tensor.astype("<u4") << 16).view("<f4"))
        else:
            writer.add_tensor(name, tensor.view("u1"), raw_dtype=gguf.GGMLQuantizationType.BF16)

    add("token_embd.weight", weights["model.embed_tokens.weight"])
    add("output_norm.weight", weights["model.norm.weight"])
    add("output.weight", weights["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        of, to = f"model.layers.{layer}", f"blk.{layer}"
        for theirs, ours in NAMES.items():
            add(f"{to}.{ours}.weight", weights[f"{of}.{theirs}.weight"])
        for part in ("gate", "up", "down"):
            names = (f"{of}.mlp.experts.{expert}.{part}_proj.weight" for expert in range(config["num_experts"]))
            add(f"{to}.ffn_{part}_exps.weight", numpy.stack([weights[name] for name in names]))
        print(f"layer {layer + 1} of {config['num_hidden_layers']}", file=sys.stderr)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=sys.stderr.isatty())
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
