#!/usr/bin/env python3
"""How long a mesh takes until it serves, with and without packed weights on disk, and what its processes keep resident.

    start.py --model DIR [--experts 2] [--dtype bf16] [--json]

Starts the mesh three times: without a cache, with an empty --cache-dir, and with the one just filled; generates 64 tokens each time
and reads the kernel's own account (VmRSS) of every node. Needs `cargo build --release --workspace --bins`."""

import argparse
import json
import pathlib
import signal
import subprocess
import tempfile
import time

BINS = pathlib.Path(__file__).resolve().parent.parent / "target/release"


def resident_mib(pid: int) -> float:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


def start(args: argparse.Namespace, cache: str | None) -> dict:
    command = [BINS / "meshctl", "up", "--model", args.model, "--attention", "1", "--experts", str(args.experts)]
    command += ["--dtype", args.dtype, "--grpc", "127.0.0.1:0", "--log", "warn", "--json"]
    command += ["--cache-dir", cache] if cache else []
    begun = time.monotonic()
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True) as mesh:
        try:
            line = mesh.stdout.readline()
            if not line:
                raise SystemExit("the mesh did not start; its message is above")
            seconds, ready = time.monotonic() - begun, json.loads(line)
            generate = [str(BINS / "meshctl"), "generate", "--grpc", ready["grpc"], "--token-ids", "57,280,718"]
            generate += ["--max-new-tokens", "64", "--ignore-eos", "--json"]
            tokens = json.loads(subprocess.run(generate, check=True, capture_output=True, text=True).stdout)["token_ids"]
            nodes = {node["id"]: resident_mib(node["pid"]) for node in ready["nodes"]}
        finally:
            mesh.send_signal(signal.SIGINT)
    return {"ready_s": seconds, "resident_mib": nodes, "token_ids": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--experts", type=int, default=2, help="expert nodes")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mesh-cache-") as cache:
        runs = {"no cache": start(args, None), "cache, first": start(args, cache), "cache, second": start(args, cache)}
        packed = sum(file.stat().st_size for file in pathlib.Path(cache).rglob("*.pack")) / 2**20
    if len({tuple(run["token_ids"]) for run in runs.values()}) != 1:
        raise SystemExit("the starts do not agree on the tokens")
    if args.json:
        print(json.dumps({"packed_mib": packed, "runs": runs}))
        return
    for name, run in runs.items():
        resident = {id_: mib for id_, mib in run["resident_mib"].items() if not id_.startswith("router")}
        nodes = ", ".join(f"{id_} {mib:.0f}" for id_, mib in resident.items())
        share = sum(resident.values()) / packed
        print(f"{name:14} ready in {run['ready_s']:6.2f} s; resident MiB: {nodes}; {share:.2f}x of the packed {packed:.0f}")


if __name__ == "__main__":
    main()
