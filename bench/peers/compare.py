#!/usr/bin/env python3
"""The mesh beside the engines that people run on one machine: same weights, same threads, same prompts, in turns.

    compare.py --model DIR [--peers llama.cpp,transformers] [--shapes 1A2E:ucx,1A1E:local] [--rounds 3] [--json FILE]

All engines are loaded at once and take turns in every round, so that a change of the machine's mood meets all of them. Figures
are medians over the rounds: prefill in tokens a second up to the first token; decode in tokens a second, which is streams over the
median time between two tokens. Needs requirements.txt, and `cargo build --release --workspace --bins`."""

import argparse
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class Peer:
    """An engine of engines.py."""

    def __init__(self, name: str, model: pathlib.Path, threads: int) -> None:
        self.name = name
        command = [sys.executable, str(HERE / "engines.py"), name, str(model), str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.hear()

    def hear(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended; its message is above")
        return json.loads(line)

    def ask(self, **order) -> dict:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def prefill(self, tokens: int, seed: int) -> float:
        return tokens / self.ask(do="prefill", tokens=tokens, seed=seed)["seconds"]

    def decode(self, streams: int, prompt: int, steps: int) -> float:
        return streams / statistics.median(self.ask(do="decode", streams=streams, prompt=prompt, steps=steps)["steps"])

    def greedy(self, ids: list[int], steps: int) -> list[int]:
        return self.ask(do="greedy", token_ids=ids, steps=steps)["token_ids"]

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)


class Mesh:
    """A mesh of `meshctl up`, measured by `meshctl bench`."""

    def __init__(self, shape: str, model: pathlib.Path, threads: int, bins: pathlib.Path) -> None:
        self.name, self.meshctl = f"mesh {shape}", bins / "meshctl"
        nodes, transport = shape.split(":")
        attention, experts = nodes.rstrip("E").split("A")
        command = [self.meshctl, "up", "--model", model, "--attention", attention, "--experts", experts, "--json"]
        command += ["--transport", transport, "--dtype", "bf16", "--grpc", "127.0.0.1:0", "--log", "warn"]
        command += ["--threads", str(threads)]
        self.process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} did not start; its message is above")
        self.grpc = json.loads(line)["grpc"]

    def bench(self, streams: int, prompt: int, tokens: int, seed: int) -> dict:
        command = [self.meshctl, "bench", "--grpc", self.grpc, "--concurrency", streams, "--requests", streams]
        command += ["--warmup", 0, "--input-tokens", prompt, "--output-tokens", tokens, "--seed", seed, "--json", "-"]
        ran = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
        if ran.returncode != 0:
            sys.exit(f"meshctl bench failed: {ran.stderr}")
        return json.loads(ran.stdout)["points"][0]["latency_ms"]

    def prefill(self, tokens: int, seed: int) -> float:
        return tokens / self.bench(1, tokens, 1, seed)["ttft"]["p50"] * 1e3

    def decode(self, streams: int, prompt: int, steps: int) -> float:
        return streams / self.bench(streams, prompt, steps + 1, 0)["inter_token"]["p50"] * 1e3

    def greedy(self, ids: list[int], steps: int) -> list[int]:
        command = [self.meshctl, "generate", "--grpc", self.grpc, "--token-ids", ",".join(map(str, ids))]
        command += ["--max-new-tokens", steps + 1, "--ignore-eos", "--json"]
        ran = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600, check=True)
        return json.loads(ran.stdout)["token_ids"]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=60)


def gguf_of(model: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    file = folder / f"{model.resolve().name}.gguf"
    if not file.exists():
        part = file.with_suffix(".part")
        subprocess.run([sys.executable, str(HERE / "to_gguf.py"), str(model), str(part)], check=True)
        part.rename(file)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a Qwen3-MoE directory")
    parser.add_argument("--peers", default="llama.cpp,transformers")
    parser.add_argument("--shapes", default="1A2E:ucx", help="meshes, as 1A2E:ucx,1A1E:local")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each peer, and of each node of a mesh")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--prefill", default="512")
    parser.add_argument("--prompt", type=int, default=16, help="prompt tokens of each decoding stream")
    parser.add_argument("--steps", type=int, default=24, help="tokens of each decoding stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gguf-dir", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()))
    parser.add_argument("--bin-dir", type=pathlib.Path, default=ROOT / "target/release")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()

    engines: list = []
    try:
        for shape in filter(None, args.shapes.split(",")):
            engines.append(Mesh(shape, args.model, args.threads, args.bin_dir))
        for name in filter(None, args.peers.split(",")):
            weights = gguf_of(args.model, args.gguf_dir) if name == "llama.cpp" else args.model
            engines.append(Peer(name, weights, args.threads))
        figures: dict = {}
        for round_ in range(args.rounds + 1):
            for engine in engines:
                for tokens in map(int, args.prefill.split(",")):
                    figures.setdefault(f"prefill {tokens}", {}).setdefault(engine.name, []).append(
                        engine.prefill(tokens, round_)
                    )
            for streams in map(int, args.streams.split(",")):
                for engine in engines:
                    figures.setdefault(f"decode {streams}", {}).setdefault(engine.name, []).append(
                        engine.decode(streams, args.prompt, args.steps)
                    )
            print(f"round {round_} of {args.rounds} done" + (" (warm-up)" if round_ == 0 else ""), file=sys.stderr)
        greedy = {engine.name: engine.greedy([57, 280, 718], 15) for engine in engines}
    finally:
        for engine in engines:
            engine.stop()

    medians = {figure: {name: statistics.median(v[1:]) for name, v in by.items()} for figure, by in figures.items()}
    names = [engine.name for engine in engines]
    meshes = [name for name in names if name.startswith("mesh ")]
    print(f"\ntokens/s, medians of {args.rounds} rounds; {args.threads} threads, bf16")
    print(f"{'':14}" + "".join(f"{name:>18}" for name in names))
    for figure, by in medians.items():
        print(f"{figure:14}" + "".join(f"{by[name]:18.1f}" for name in names))
    for mesh in meshes:
        for peer in (name for name in names if name not in meshes):
            ratios = "  ".join(f"{figure} {by[mesh] / by[peer]:.2f}" for figure, by in medians.items())
            print(f"{mesh} / {peer}: {ratios}")
    first = names[0]
    for name in names[1:]:
        same = next((at for at, (a, b) in enumerate(zip(greedy[first], greedy[name])) if a != b), len(greedy[first]))
        print(f"greedy tokens equal to {first}: {name} {same} of {len(greedy[first])}")
    if args.json:
        commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        machine = {"cpus": os.cpu_count(), "platform": platform.platform()}
        report = {"command": sys.argv, "commit": commit, "machine": machine, "time": time.time()}
        args.json.write_text(json.dumps({**report, "medians": medians, "rounds": figures, "greedy": greedy}, indent=1))


if __name__ == "__main__":
    main()
