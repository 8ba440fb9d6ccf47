#!/usr/bin/env python3
"""Dispatch and combine beside Open MPI's MPI_Alltoallv with the same counts, on this machine, in turns.

    run.py [--rounds 3] [--block-ms 150] [--gather] [--json FILE]

In each round `mesh-bench exchange` and alltoallv.c measure the same round trips (rows of hidden 2048 in bf16, one expert a row, 1A1E and
2A4E): ours over local and ucx beside MPI over shared memory and, where Open MPI has it, UCX, of which the faster counts; tcp beside tcp.
MPI runs with mpi_yield_when_idle 0 and 1, of which the faster counts. Ours copies its rows into each message; MPI sends one buffer over
and over unless --gather makes it copy them too. Figures are medians over the rounds; a ratio below 1 means that ours is faster. Needs
mpicc and mpirun of Open MPI (Debian: libopenmpi-dev, openmpi-bin; without them exit code 3), and `cargo build --release -p mesh-bench`."""

import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SHAPES = {"1A1E": (1, 1), "2A4E": (2, 4)}
MPI = {
    "shared memory": ["--mca", "pml", "ob1", "--mca", "btl", "self,vader"],
    # Without the last two it refuses a machine that has no InfiniBand.
    "ucx": ["--mca", "pml", "ucx", "--mca", "pml_ucx_tls", "any", "--mca", "pml_ucx_devices", "any"],
    "tcp": ["--mca", "pml", "ob1", "--mca", "btl", "self,tcp", "--mca", "btl_tcp_if_include", "lo"],
}
BESIDE = {"local": ("shared memory", "ucx"), "ucx": ("shared memory", "ucx"), "tcp": ("tcp",)}
PATIENCE_S = 120
NO_MPI = 3


def run(command: list, what: str) -> str:
    """What it prints. It is asked to end, not killed, when it takes too long: mpirun then ends its ranks."""
    words = [str(word) for word in command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=PATIENCE_S)
        except BaseException as error:
            process.terminate()
            if isinstance(error, subprocess.TimeoutExpired):
                sys.exit(f"{what} took longer than {PATIENCE_S} s")
            raise
    if process.returncode != 0:
        sys.exit(f"{what} failed with {process.returncode}:\n{err}")
    return out


def pmls() -> set[str]:
    """Open MPI's point-to-point layers, as ompi_info tells them."""
    lines = run(["ompi_info", "--parsable"], "ompi_info").splitlines()
    return {line.split(":")[2] for line in lines if line.startswith("mca:pml:")}


def alltoallv(program: pathlib.Path, transport: str, shape: str, yields: int, args: argparse.Namespace) -> list[dict]:
    attention, experts = SHAPES[shape]
    command = ["mpirun", "-n", attention + experts, "--oversubscribe", "--bind-to", "none"]
    command += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    command += ["--mca", "oob_tcp_if_include", "lo", "--mca", "mpi_yield_when_idle", yields, *MPI[transport]]
    command += [program, attention, experts, args.block_ms, int(args.gather)]
    lines = run(command, f"alltoallv over {transport}, {shape}").splitlines()
    return [json.loads(line) for line in lines]


def measure(args: argparse.Namespace, program: pathlib.Path, transports: list[str]) -> dict:
    """(who, transport, shape, rows, yields or None) -> [(p50, p99) of each round]."""
    figures: dict = {}
    for round_ in range(args.rounds):
        for kind in BESIDE:
            report = run([args.bin_dir / "mesh-bench", "exchange", "--json", "--transport", kind], "mesh-bench")
            report = json.loads(report)
            for f in report["figures"]:
                key = ("ours", kind, f["shape"], f["rows"], None)
                figures.setdefault(key, []).append((f["p50_us"], f["p99_us"]))
            for line in report["left_out"] if round_ == 0 else []:
                print(f"left out: {line}", file=sys.stderr)
        for transport in transports:
            for shape in SHAPES:
                for yields in (0, 1):
                    for f in alltoallv(program, transport, shape, yields, args):
                        key = ("mpi", transport, shape, f["rows"], yields)
                        figures.setdefault(key, []).append((f["p50_us"], f["p99_us"]))
        print(f"round {round_ + 1} of {args.rounds} done", file=sys.stderr)
    return figures


def best(figures: dict, who: str, transports: tuple[str, ...], shape: str, rows: int) -> dict | None:
    """The fastest by p50, medians over the rounds."""
    found = []
    for (of, transport, at, n, yields), values in figures.items():
        if (of, at, n) == (who, shape, rows) and transport in transports:
            p50, p99 = (statistics.median(column) for column in zip(*values))
            found.append({"p50_us": p50, "p99_us": p99, "transport": transport, "yields": yields})
    return min(found, key=lambda one: one["p50_us"], default=None)


def compare(figures: dict) -> list[dict]:
    rows_of = sorted({key[3] for key in figures})
    lines = []
    for kind, beside in BESIDE.items():
        for shape in SHAPES:
            for rows in rows_of:
                ours, mpi = best(figures, "ours", (kind,), shape, rows), best(figures, "mpi", beside, shape, rows)
                if ours and mpi:
                    ratio = ours["p50_us"] / mpi["p50_us"]
                    lines.append({"transport": kind, "shape": shape, "rows": rows, "ours": ours, "mpi": mpi, "ratio": ratio})
    return lines


def show(lines: list[dict]) -> None:
    print(f"{'':6}{'shape':6}{'rows':>5}  {'ours p50 us':>12}{'p99':>9}  {'Alltoallv p50 us':>17}{'p99':>9}  {'ratio':>6}  over")
    for line in lines:
        ours, mpi = line["ours"], line["mpi"]
        print(
            f"{line['transport']:6}{line['shape']:6}{line['rows']:5}  {ours['p50_us']:12.1f}{ours['p99_us']:9.1f}"
            f"  {mpi['p50_us']:17.1f}{mpi['p99_us']:9.1f}  {line['ratio']:6.2f}  {mpi['transport']}, yields {mpi['yields']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block-ms", type=int, default=150, help="how long alltoallv.c measures each number of rows")
    parser.add_argument("--gather", action="store_true", help="MPI's attention ranks copy their rows too, as ours do")
    parser.add_argument("--bin-dir", type=pathlib.Path, default=ROOT / "target/release")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    if absent := [tool for tool in ("mpicc", "mpirun", "ompi_info") if not shutil.which(tool)]:
        print(f"NOT MEASURED: {', '.join(absent)} not found. Debian: libopenmpi-dev openmpi-bin", file=sys.stderr)
        sys.exit(NO_MPI)
    version = run(["mpirun", "--version"], "mpirun").splitlines()[0]
    transports = [name for name in MPI if name != "ucx" or "ucx" in pmls()]
    with tempfile.TemporaryDirectory(prefix="mesh-mpi-") as folder:
        program = pathlib.Path(folder) / "alltoallv"
        run(["mpicc", "-O2", "-Wall", "-Wextra", "-o", program, HERE / "alltoallv.c"], "mpicc")
        figures = measure(args, program, transports)
    lines = compare(figures)
    print(f"\n{version}; medians of {args.rounds} rounds; MPI over {', '.join(transports)}{', gathers' * args.gather}; {os.cpu_count()} processors")
    show(lines)
    if args.json:
        commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "mpi": version}
        every = [dict(zip(("who", "transport", "shape", "rows", "yields"), key), rounds=v) for key, v in figures.items()]
        report = {"command": sys.argv, "commit": commit, "machine": machine, "time": time.time()}
        args.json.write_text(json.dumps({**report, "compared": lines, "figures": every}, indent=1))


if __name__ == "__main__":
    main()
