"""One engine in a process of its own: engines.py NAME MODEL THREADS [RPC WORKERS as HOST:PORT...], then one JSON order per line of
input ({"do":"prefill","tokens":N}, {"do":"decode","streams":S,"prompt":N,"steps":K}, {"do":"greedy",...}), one JSON answer per line
of output. Times are seconds; a step makes one token of each stream."""

import ctypes
import json
import random
import sys
import time

from rpc_worker import library

STREAMS_MAX = 64
ERROR = 4  # ggml_log_level


def say_errors(level: int, text: bytes, _) -> None:
    if level == ERROR:
        print(text.decode(errors="replace").rstrip(), file=sys.stderr)


def prompt(tokens: int, vocab: int, seed: int) -> list[int]:
    """Random token ids, as `meshctl bench` sends them."""
    return random.Random(seed).choices(range(3, vocab), k=tokens)


class Llama:
    """llama.cpp through llama-cpp-python's plain C interface."""

    def __init__(self, model: str, threads: int) -> None:
        import llama_cpp

        self.c = llama_cpp
        self.log = llama_cpp.llama_log_callback(say_errors)
        llama_cpp.llama_log_set(self.log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self.place(params)
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), params)
        if not self.model:
            sys.exit(f"llama.cpp cannot load {model}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = STREAMS_MAX * 256
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = STREAMS_MAX
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit("llama.cpp cannot make a context")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def place(self, params) -> None:
        """Says where the weights go."""

    def forget(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)

    def run(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Computes (token, position, stream, wants logits) in one batch."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for at, (token, position, stream, logits) in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.logits[at] = token, position, logits
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, stream
        if self.c.llama_decode(self.context, batch) != 0:
            sys.exit("llama.cpp failed to compute a batch")

    def best(self, at: int) -> int:
        import numpy

        return int(numpy.ctypeslib.as_array(self.c.llama_get_logits_ith(self.context, at), (self.vocab,)).argmax())

    def prefill(self, ids: list[int]) -> float:
        self.forget()
        begun = time.perf_counter()
        self.run([(token, at, 0, at + 1 == len(ids)) for at, token in enumerate(ids)])
        self.best(len(ids) - 1)
        return time.perf_counter() - begun

    def decode(self, prompts: list[list[int]], steps: int) -> tuple[list[float], list[list[int]]]:
        self.forget()
        made: list[list[int]] = []
        for stream, ids in enumerate(prompts):
            self.run([(token, at, stream, at + 1 == len(ids)) for at, token in enumerate(ids)])
            made.append([self.best(len(ids) - 1)])
        times = []
        for _ in range(steps):
            begun = time.perf_counter()
            self.run([(m[-1], len(p) + len(m) - 1, s, True) for s, (p, m) in enumerate(zip(prompts, made))])
            for stream, tokens in enumerate(made):
                tokens.append(self.best(stream))
            times.append(time.perf_counter() - begun)
        return times, made


class BufferRule(ctypes.Structure):
    """llama_model_tensor_buft_override: tensors of this name pattern live in this kind of buffer. A zeroed one ends a list."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buffers", ctypes.c_void_p)]


def layers_of(model: str) -> int:
    import gguf

    fields = gguf.GGUFReader(model).fields
    return next(int(field.parts[field.data[0]][0]) for name, field in fields.items() if name.endswith(".block_count"))


class LlamaRpc(Llama):
    """llama.cpp with RPC workers, which hold whole layers, or only the routed experts of whole layers: it splits no layer."""

    def __init__(self, model: str, threads: int, workers: list[str], experts_only: bool) -> None:
        self.file, self.workers, self.experts_only = model, workers, experts_only
        super().__init__(model, threads)

    def place(self, params) -> None:
        base, rpc = library("ggml-base"), library("ggml-rpc")
        rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
        base.ggml_backend_reg_dev_get.restype = base.ggml_backend_dev_buffer_type.restype = ctypes.c_void_p
        devices = []
        for worker in self.workers:
            registry = rpc.ggml_backend_rpc_add_server(worker.encode())
            if not registry:
                sys.exit(f"llama.cpp cannot use the RPC worker {worker}")
            devices.append(base.ggml_backend_reg_dev_get(ctypes.c_void_p(registry), ctypes.c_size_t(0)))
        self.devices = (ctypes.c_void_p * (len(devices) + 1))(*devices, None)
        params.devices = ctypes.addressof(self.devices)
        if not self.experts_only:
            params.n_gpu_layers = -1
            self.shares = (ctypes.c_float * self.c.llama_max_devices())(*[1.0] * len(devices))
            params.tensor_split = self.shares
            return
        params.n_gpu_layers = 0
        rules, layers = [], layers_of(self.file)
        for at, device in enumerate(devices):
            mine = "|".join(str(layer) for layer in range(layers) if layer * len(devices) // layers == at)
            buffers = base.ggml_backend_dev_buffer_type(ctypes.c_void_p(device))
            rules.append(BufferRule(f"blk\\.({mine})\\.ffn_.*_exps".encode(), buffers))
        self.rules = (BufferRule * (len(rules) + 1))(*rules)
        params.tensor_buft_overrides = ctypes.addressof(self.rules)


class Transformers:
    """Hugging Face transformers, its eager forward pass with its own cache."""

    def __init__(self, model: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self.vocab = self.model.config.vocab_size

    def prefill(self, ids: list[int]) -> float:
        with self.torch.inference_mode():
            begun = time.perf_counter()
            out = self.model(self.torch.tensor([ids]), use_cache=True, logits_to_keep=1)
            out.logits[:, -1].argmax(-1).tolist()
            return time.perf_counter() - begun

    def decode(self, prompts: list[list[int]], steps: int) -> tuple[list[float], list[list[int]]]:
        with self.torch.inference_mode():
            out = self.model(self.torch.tensor(prompts), use_cache=True, logits_to_keep=1)
            made, times = [out.logits[:, -1].argmax(-1)], []
            for _ in range(steps):
                begun = time.perf_counter()
                out = self.model(made[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
                made.append(out.logits[:, -1].argmax(-1))
                made[-1].tolist()
                times.append(time.perf_counter() - begun)
            return times, self.torch.stack(made, 1).tolist()


def main() -> None:
    name, model, threads, workers = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
    if name == "llama.cpp":
        engine = Llama(model, threads)
    elif name == "transformers":
        engine = Transformers(model, threads)
    else:
        experts_only = {"llama.cpp-rpc/layers": False, "llama.cpp-rpc/experts": True}[name]
        engine = LlamaRpc(model, threads, workers, experts_only)
    print(json.dumps({"ready": name}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "prefill":
            answer = {"seconds": engine.prefill(prompt(order["tokens"], engine.vocab, order.get("seed", 0)))}
        elif order["do"] == "decode":
            prompts = [prompt(order["prompt"], engine.vocab, seed) for seed in range(order["streams"])]
            answer = {"steps": engine.decode(prompts, order["steps"])[0]}
        else:
            answer = {"token_ids": engine.decode([order["token_ids"]], order["steps"])[1][0]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
