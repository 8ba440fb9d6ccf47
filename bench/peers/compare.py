#!/usr/bin/env python3
"""The mesh beside the engines that people run on one machine: same weights, same processors, same prompts, in turns.

    compare.py --model DIR [--peers llama.cpp,transformers] [--shapes 1A2E:ucx,1A1E:local] [--rounds 3] [--apart] [--json FILE]
    compare.py --model DIR --peers llama.cpp-rpc --shapes 1A4E:ucx

llama.cpp-rpc is llama.cpp with workers of its own in further processes, over loopback, twice: whole layers on the workers, and only the
routed experts of whole layers. Peers compute with all processors; a mesh's nodes, and the workers, with as many threads as each takes by
default (--mesh-threads, --rpc-threads).

All engines are loaded at once and take turns in every round, so that a change of the machine's mood meets all of them. With --apart
only one is there at a time: each round starts every engine, warms it up, measures it and ends it, the first one last in the next round,
so that none shares memory or caches with another.

Figures are medians over the rounds: prefill in tokens a second up to the first token; decode in tokens a second, which is streams over
the median time between two tokens. Needs requirements.txt, and `cargo build --release --workspace --bins`."""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent


RPC = "llama.cpp-rpc"


def end(process: subprocess.Popen, signal_: int, patience_s: float) -> None:
    """Ends a process of ours, the hard way if it must be."""
    process.send_signal(signal_)
    try:
        process.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class RpcWorker:
    """A worker of llama.cpp-rpc. It ends with this process even where stop() is not reached: its input ends then."""

    def __init__(self, threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, str(HERE / "rpc_worker.py"), f"127.0.0.1:{self.port}", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def ready(self) -> str:
        """Its address, once it listens there."""
        for _ in range(600):
            if self.process.poll() is not None:
                break
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port)):
                return f"127.0.0.1:{self.port}"
            time.sleep(0.05)
        sys.exit(f"an RPC worker of llama.cpp does not listen on port {self.port}")

    def stop(self) -> None:
        end(self.process, signal.SIGTERM, 10)


class Peer:
    """An engine of engines.py."""

    def __init__(self, name: str, model: pathlib.Path, threads: int, workers: list[str]) -> None:
        self.name = name
        command = [sys.executable, str(HERE / "engines.py"), name, str(model), str(threads), *workers]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ready(self) -> None:
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
        end(self.process, signal.SIGTERM, 10)


class Mesh:
    """A mesh of `meshctl up`, measured by `meshctl bench`."""

    def __init__(self, shape: str, args: argparse.Namespace) -> None:
        self.name, self.meshctl = f"mesh {shape}", args.bin_dir / "meshctl"
        nodes, transport = shape.split(":")
        attention, experts = nodes.rstrip("E").split("A")
        threads = args.mesh_threads
        command = [self.meshctl, "up", "--model", args.model, "--attention", attention, "--experts", experts, "--json"]
        command += ["--cache-dir", args.cache_dir] if args.cache_dir else []
        command += ["--transport", transport, "--dtype", "bf16", "--grpc", "127.0.0.1:0", "--log", "warn"]
        command += ["--threads", str(threads)] if threads else []
        self.process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)

    def ready(self) -> None:
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
        end(self.process, signal.SIGINT, 60)


def gguf_of(model: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    file = folder / f"{model.resolve().name}.gguf"
    if not file.exists():
        part = file.with_suffix(".part")
        subprocess.run([sys.executable, str(HERE / "to_gguf.py"), str(model), str(part)], check=True)
        part.rename(file)
    return file


@contextlib.contextmanager
def served(shape: str, args: argparse.Namespace):
    """A mesh that serves."""
    mesh = Mesh(shape, args)
    try:
        mesh.ready()
        yield mesh
    finally:
        mesh.stop()


@contextlib.contextmanager
def loaded(name: str, weights: pathlib.Path, args: argparse.Namespace):
    """A peer that has loaded its weights, with its workers if it has any."""
    with contextlib.ExitStack() as running:
        workers = []
        for _ in range(args.rpc_workers if name.startswith(RPC) else 0):
            worker = RpcWorker(args.rpc_threads)
            running.callback(worker.stop)
            workers.append(worker.ready())
        peer = Peer(name, weights, args.threads, workers)
        running.callback(peer.stop)
        peer.ready()
        yield peer


def starts(args: argparse.Namespace) -> list:
    """For each engine what starts it and ends it."""
    engines = [functools.partial(served, shape, args) for shape in args.shapes.split(",") if shape]
    for of in filter(None, args.peers.split(",")):
        weights = gguf_of(args.model, args.gguf_dir) if of.startswith("llama.cpp") else args.model
        names = [f"{RPC}/layers", f"{RPC}/experts"] if of == RPC else [of]
        engines += [functools.partial(loaded, name, weights, args) for name in names]
    return engines


def measure(args: argparse.Namespace, engines: list, round_: int, figures: dict) -> None:
    """Adds each engine's value to figure -> engine -> values."""
    for tokens in map(int, args.prefill.split(",")):
        for engine in engines:
            value = engine.prefill(tokens, round_)
            figures.setdefault(f"prefill {tokens}", {}).setdefault(engine.name, []).append(value)
    for streams in map(int, args.streams.split(",")):
        for engine in engines:
            value = engine.decode(streams, args.prompt, args.steps)
            figures.setdefault(f"decode {streams}", {}).setdefault(engine.name, []).append(value)


def together(args: argparse.Namespace) -> tuple[dict, dict]:
    """The figures, and each engine's greedy tokens; each is ready before the next is started, so that none loads while another
    packs its weights."""
    figures: dict = {}
    with contextlib.ExitStack() as running:
        engines = [running.enter_context(start()) for start in starts(args)]
        for round_ in range(args.rounds + 1):
            # The first is the warm-up's.
            measure(args, engines, round_, figures if round_ else {})
            print(f"round {round_} of {args.rounds} done" + ("" if round_ else " (warm-up)"), file=sys.stderr)
        return figures, {engine.name: greedy(engine) for engine in engines}


def apart(args: argparse.Namespace) -> tuple[dict, dict]:
    """The same of engines of which only one is there at a time."""
    figures, chosen = {}, {}
    engines = starts(args)
    for round_ in range(1, args.rounds + 1):
        for start in engines if round_ % 2 else engines[::-1]:
            with start() as engine:
                measure(args, [engine], 0, {})
                measure(args, [engine], round_, figures)
                chosen[engine.name] = greedy(engine)
                print(f"round {round_} of {args.rounds}: {engine.name} done", file=sys.stderr)
    return figures, chosen


def greedy(engine) -> list[int]:
    return engine.greedy([57, 280, 718], 15)


def show(args: argparse.Namespace, names: list[str], medians: dict, chosen: dict) -> None:
    nodes = f"{args.mesh_threads} threads a node" if args.mesh_threads else "a node's default threads"
    workers = f", {args.rpc_workers} RPC workers of {args.rpc_threads} threads" if RPC in args.peers else ""
    print(f"\ntokens/s, medians of {args.rounds} rounds, bf16; mesh: {nodes}; peers: {args.threads} threads{workers}")
    width = max(map(len, names)) + 3
    print(f"{'':14}" + "".join(f"{name:>{width}}" for name in names))
    for figure, by in medians.items():
        print(f"{figure:14}" + "".join(f"{by[name]:{width}.1f}" for name in names))
    meshes = [name for name in names if name.startswith("mesh ")]
    peers = {name: [name] for name in names if name not in meshes}
    if placements := [name for name in peers if name.startswith(RPC)]:
        peers[f"the better of {RPC}"] = placements
    for mesh in meshes:
        for peer, of in peers.items():
            ratios = (f"{figure} {by[mesh] / max(by[name] for name in of):.2f}" for figure, by in medians.items())
            print(f"{mesh} / {peer}: {'  '.join(ratios)}")
    first = names[0]
    for name in names[1:]:
        same = next((at for at, (a, b) in enumerate(zip(chosen[first], chosen[name])) if a != b), len(chosen[first]))
        print(f"greedy tokens equal to {first}: {name} {same} of {len(chosen[first])}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a Qwen3-MoE directory")
    parser.add_argument("--peers", default="llama.cpp,transformers", help=f"of llama.cpp, {RPC}, transformers")
    parser.add_argument("--shapes", default="1A2E:ucx", help="meshes, as 1A2E:ucx,1A1E:local")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each peer; default: all processors")
    parser.add_argument("--mesh-threads", type=int, help="of each node of a mesh; default: what meshctl gives it")
    parser.add_argument("--rpc-workers", type=int, default=4, help=f"of {RPC}, for each of its placements")
    parser.add_argument("--rpc-threads", type=int, default=1, help="of each of these workers")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--prefill", default="512")
    parser.add_argument("--prompt", type=int, default=16, help="prompt tokens of each decoding stream")
    parser.add_argument("--steps", type=int, default=24, help="tokens of each decoding stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--apart", action="store_true", help="one engine at a time, started anew in every round")
    parser.add_argument("--cache-dir", type=pathlib.Path, help="where meshes keep their packed weights; starts are quick with it")
    parser.add_argument("--gguf-dir", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()))
    parser.add_argument("--bin-dir", type=pathlib.Path, default=ROOT / "target/release")
    parser.add_argument("--json", type=pathlib.Path)
    return parser.parse_args()


def main() -> None:
    args = parse()
    # Ends as on any other failure, so that nothing stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    figures, chosen = (apart if args.apart else together)(args)
    medians = {figure: {name: statistics.median(values) for name, values in by.items()} for figure, by in figures.items()}
    show(args, list(chosen), medians, chosen)
    if args.json:
        commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        machine = {"cpus": os.cpu_count(), "platform": platform.platform()}
        report = {"command": sys.argv, "commit": commit, "machine": machine, "time": time.time()}
        args.json.write_text(json.dumps({**report, "medians": medians, "rounds": figures, "greedy": chosen}, indent=1))


if __name__ == "__main__":
    main()
