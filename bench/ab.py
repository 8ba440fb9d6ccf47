#!/usr/bin/env python3
"""Two builds serve the same load on this machine, in turns: what a change costs, or gains, in throughput.

    ab.py --a DIR --b DIR --model DIR [--transport tcp,ucx] [--concurrency 8,32] [--rounds 5] [--together] [--cache-dir DIR] [--json FILE]

DIR of --a and --b has the binaries (target/release). In each round a mesh of each build is started, warmed up, measured with its own
`meshctl bench` and stopped, A before B in even rounds and B before A in odd ones. With --together both meshes are started once and stay
up, one idle while the other is measured: turns can be short and many, for what is smaller than the machine's moods. Figures are output
tokens a second, medians over the rounds; the ratio is the median of the rounds' ratios B / A, with the least and the most, and their
geometric mean with its standard error."""

import argparse
import contextlib
import json
import math
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile

PATIENCE_S = 300


@contextlib.contextmanager
def served(binaries: pathlib.Path, transport: str, args: argparse.Namespace):
    """A mesh, as a function that measures output tokens a second by concurrency."""
    meshctl = str(binaries / "meshctl")
    up = [meshctl, "up", "--model", args.model, "--transport", transport, "--grpc", "127.0.0.1:0", "--json", "--log", "error"]
    up += ["--attention", str(args.attention), "--experts", str(args.experts)]
    up += ["--cache-dir", args.cache_dir] if args.cache_dir else []
    with subprocess.Popen(up, stdout=subprocess.PIPE, text=True) as mesh:
        try:
            ready = mesh.stdout.readline()
            if not ready:
                sys.exit(f"{meshctl} up did not come up")
            grpc = json.loads(ready)["grpc"]
            yield lambda: {n: measure(meshctl, grpc, n, args) for n in args.concurrency}
        finally:
            mesh.send_signal(signal.SIGTERM)


def rounds_of(transport: str, args: argparse.Namespace):
    """The rounds over one transport: what A and B did, by concurrency."""
    with contextlib.ExitStack() as both:
        up = {side: both.enter_context(served(getattr(args, side), transport, args)) for side in "ab"} if args.together else {}
        for number in range(args.rounds):
            pair = {}
            for side in "ab" if number % 2 == 0 else "ba":
                with contextlib.ExitStack() as alone:
                    run = up.get(side) or alone.enter_context(served(getattr(args, side), transport, args))
                    pair[side] = run()
            print(f"{transport} round {number + 1} of {args.rounds}: {pair}", file=sys.stderr)
            yield pair


def measure(meshctl: str, grpc: str, concurrency: int, args: argparse.Namespace) -> float:
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        bench = [meshctl, "bench", "--grpc", grpc, "--concurrency", str(concurrency), "--json", report.name, "--no-counters"]
        bench += ["--requests", str(args.per_stream * concurrency)]
        bench += ["--warmup", str(concurrency if args.warmup is None else args.warmup)]
        bench += ["--input-tokens", str(args.input), "--output-tokens", str(args.output)]
        done = subprocess.run(bench, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S)
        if done.returncode != 0:
            sys.exit(f"{' '.join(bench)} failed with {done.returncode}:\n{done.stderr}")
        return json.load(open(report.name))["points"][0]["output_tokens_per_s"]


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--a", type=pathlib.Path, required=True)
    parser.add_argument("--b", type=pathlib.Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--cache-dir")
    parser.add_argument("--transport", default="tcp")
    parser.add_argument("--concurrency", type=numbers, default=[8])
    parser.add_argument("--attention", type=int, default=1)
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--per-stream", type=int, default=2, help="requests of each stream")
    parser.add_argument("--warmup", type=int, help="requests before each measurement; as many as there are streams by default")
    parser.add_argument("--input", type=int, default=32)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--together", action="store_true", help="both meshes stay up and are measured in turns")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()

    found = {}
    for transport in args.transport.split(","):
        rounds = list(rounds_of(transport, args))
        for n in args.concurrency:
            a, b = ([pair[side][n] for pair in rounds] for side in "ab")
            ratios = [y / x for x, y in zip(a, b)]
            row = {"a": statistics.median(a), "b": statistics.median(b), "ratio": statistics.median(ratios)}
            logs = [math.log(ratio) for ratio in ratios]
            error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
            row |= {"ratio_mean": math.exp(statistics.mean(logs)), "ratio_error": error}
            row |= {"ratio_min": min(ratios), "ratio_max": max(ratios), "rounds": {"a": a, "b": b}}
            found[f"{transport} {n}"] = row
            print(
                f"{transport:>4} {n:>3} streams: A {row['a']:.1f}, B {row['b']:.1f} tokens/s, "
                f"B / A {row['ratio']:.3f} ({row['ratio_min']:.3f} to {row['ratio_max']:.3f}), "
                f"mean {row['ratio_mean']:.3f} +- {row['ratio_error']:.3f}"
            )
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "found": found}, indent=1))


if __name__ == "__main__":
    main()
