"""Measure calls of many ranks on this machine, and draw what the model says of large ones.

usage: python benchmarks/ranks.py BUILD [--rounds N] [--json FILE] [--plot FILE]

BUILD is a build folder with ranks_benchmark. Measured, rank by rank with one thread: one rank, two
that share memory, and (as root) two in network namespaces, as hosts of their own, with and without
a limit of 1 Gbit/s. Efficiency is the time of one rank over twice that of two.

The model, for n ranks with shares alike: a call takes the larger of its arithmetic, a share of one
GPU's time, and its messages, which go on meanwhile; and what comes before and after, which nothing
hides. A collective operation takes log2(n) latencies, and its bytes over the bandwidth.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
from pathlib import Path
from typing import Any

NAMESPACES = Path(__file__).parent.parent / "tests/mpi/namespaces"
Figures = dict[str, Any]


def run_all(program: Path, rounds: int) -> dict[str, list[Figures]]:
    """Run all settings in turn, `rounds` times."""
    mpirun = ["mpirun", "--allow-run-as-root", "--bind-to", "core"]
    settings = {
        "1 rank": [*mpirun, "-n", "1"],
        "2 ranks, shared memory": [*mpirun, "-n", "2"],
        "2 ranks, TCP": [str(NAMESPACES), "2"],
        "2 ranks, TCP, 1 Gbit/s": [str(NAMESPACES), "2", "--rate", "1gbit"],
    }
    results: dict[str, list[Figures]] = {name: [] for name in settings}
    for _ in range(rounds):
        for name, command in settings.items():
            done = subprocess.run(
                [*command, str(program.resolve()), "3"], capture_output=True, text=True, check=False
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if lines:
                results[name].append(json.loads(lines[0]))
            else:
                print(f"{name}: {done.stdout}{done.stderr}")
    return {name: runs for name, runs in results.items() if runs}


def median(runs: list[Figures], call: str, way: str, field: str) -> float:
    """Give the median of a field over all runs."""
    values = [
        entry[field]
        for run in runs
        for entry in run["calls"]
        if entry["call"] == call and entry["way"] == way
    ]
    return statistics.median(values)


def messages_ms(runs: list[Figures], call: str, way: str) -> float:
    """Model what a call's messages take one after another, by the link's own figures.

    Half of message_bytes goes each way between two ranks.
    """
    link = {
        field: statistics.median(run["link"][field] for run in runs) for field in runs[0]["link"]
    }
    bytes_each_way = median(runs, call, way, "message_bytes") / 2
    latencies = median(runs, call, way, "messages") * link["all_reduce_8_bytes_us"] * 1e-3
    return latencies + bytes_each_way / link["bandwidth_gb_per_s"] * 1e-6


def print_tables(results: dict[str, list[Figures]]) -> None:
    """Print links and calls as Markdown."""
    print("| between the ranks | latency | bandwidth | all-reduce, 8 bytes | 4 MiB |")
    print("| --- | --- | --- | --- | --- |")
    for name, runs in results.items():
        if runs[0]["link"]:
            latency, bandwidth, small, large = (
                statistics.median(run["link"][field] for run in runs) for field in runs[0]["link"]
            )
            print(
                f"| {name} | {latency:.2f} us | {bandwidth:.2f} GB/s | {small:.1f} us "
                f"| {large:.1f} ms |"
            )
    print("\nTime, efficiency, and in brackets what the model says where nothing overlaps, in ms:")
    alone = results["1 rank"]
    names = [name for name in results if name != "1 rank"]
    print(f"\n| call | way | 1 rank | {' | '.join(names)} | messages | bytes |")
    print("| --- " * (len(names) + 5) + "|")
    for entry in alone[0]["calls"]:
        call, way = entry["call"], entry["way"]
        one = median(alone, call, way, "ms")
        cells = []
        for name in names:
            two = median(results[name], call, way, "ms")
            model = one / 2 + messages_ms(results[name], call, way)
            cells.append(f"{two:.1f} ms, {50 * one / two:.0f} % ({model:.1f})")
        last = results[names[-1]]
        print(
            f"| {call} | {way} | {one:.1f} ms | {' | '.join(cells)} "
            f"| {median(last, call, way, 'messages'):.0f} "
            f"| {median(last, call, way, 'message_bytes'):,.0f} |"
        )


class Model:
    """Calls of 1,048,576 tokens: 32 query and 8 key heads, head_dim 128, bfloat16."""

    tokens, heads, kv_heads, dim = 1 << 20, 32, 8, 128

    def __init__(self, flops: float, read: float, bandwidth: float, latency: float) -> None:
        self.flops, self.read, self.bandwidth, self.latency = flops, read, bandwidth, latency

    def collective(self, ranks: int, total_bytes: float) -> float:
        """Seconds of an operation that moves so many bytes through each rank."""
        return self.latency * math.ceil(math.log2(ranks)) + total_bytes / self.bandwidth

    def reading(self, ranks: int, batch: int) -> float:
        """A rank's share of decode."""
        return batch * 2 * self.kv_heads * self.tokens * self.dim * 2 / self.read / ranks

    def decode(self, ranks: int, batch: int) -> float:
        """One row a sequence over all its tokens, by reductions: nothing hides their latency."""
        rows = batch * self.heads
        return (
            self.reading(ranks, batch)
            + self.collective(ranks, 32 * ranks)
            + self.collective(ranks, 2 * 4 * rows)
            + self.collective(ranks, 2 * 4 * rows * (self.dim + 1))
        )

    def arithmetic(self, ranks: int) -> float:
        """A rank's share of causal prefill."""
        return 4 * self.dim * self.heads * self.tokens**2 / 2 / self.flops / ranks

    def prefill_by_keys(self, ranks: int) -> float:
        """In order, own rows in stripes: all keys and values pass by all ranks."""
        cache = 2 * self.kv_heads * self.tokens * self.dim * 2
        first = self.collective(ranks, 4 << 20)
        return max(self.arithmetic(ranks), cache / self.bandwidth) + first

    def prefill_by_states(self, ranks: int) -> float:
        """By reductions, own rows, keys in stripes: q to all, sums to the owners."""
        rows = self.heads * self.tokens
        moved = rows * (self.dim * 2 + 2 * 4 + 4 * (self.dim + 1))
        last = self.collective(ranks, 4 << 20)
        return max(self.arithmetic(ranks), moved / self.bandwidth) + 2 * last

    def efficiency(self, work: str, ranks: int) -> float:
        """Of n ranks, in percent: the time of one without messages over n times theirs."""
        if work.startswith("decode"):
            batch = int(work.split()[-1])
            return 100 * self.reading(1, batch) / (ranks * self.decode(ranks, batch))
        time = self.prefill_by_keys if work == "prefill, ordered" else self.prefill_by_states
        return 100 * self.arithmetic(1) / (ranks * time(ranks))


WORKS = ("prefill, ordered", "prefill, reduce", "decode, batch 32", "decode, batch 1")
RANKS = (8, 16, 32, 64, 128)


def print_model(model: Model) -> None:
    """Print the model's efficiencies as Markdown."""
    print(f"\n| ranks | {' | '.join(WORKS)} |")
    print("| --- " * (len(WORKS) + 1) + "|")
    for ranks in RANKS:
        cells = [f"{model.efficiency(work, ranks):.0f} %" for work in WORKS]
        print(f"| {ranks} | {' | '.join(cells)} |")


def draw(model: Model, path: str) -> None:
    """Draw them as a picture."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "keyfold"
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(7, 4))
    for work, marker in zip(WORKS, "osD^", strict=True):
        axes.plot(RANKS, [model.efficiency(work, n) for n in RANKS], marker=marker, label=work)
    axes.axhline(93, color="0.5", linestyle=":", linewidth=1)
    axes.annotate("93 %: prefill of Yang et al. 2024 on 128 GPUs", (8, 93.5), color="0.4")
    axes.set(
        xscale="log",
        ylim=(0, 105),
        xlabel="ranks, one GPU each",
        ylabel="efficiency, %",
        title="Modelled: 1,048,576 tokens, 32/8 heads, head_dim 128, bfloat16",
    )
    axes.set_xticks(RANKS, [str(n) for n in RANKS])
    axes.minorticks_off()
    axes.legend()
    plt.tight_layout()
    plt.savefig(path, metadata={"Date": None})


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="also write what was measured")
    parser.add_argument("--plot", help="draw the model as SVG")
    parser.add_argument("--tflops", type=float, required=True, help="one GPU's causal prefill")
    parser.add_argument("--read", type=float, required=True, help="one GPU's decode, GB/s")
    parser.add_argument("--bandwidth", type=float, default=50, help="of its network, GB/s")
    parser.add_argument("--latency", type=float, default=10, help="of its network, us")
    arguments = parser.parse_args()
    model = Model(
        arguments.tflops * 1e12,
        arguments.read * 1e9,
        arguments.bandwidth * 1e9,
        arguments.latency * 1e-6,
    )
    if arguments.rounds > 0:
        results = run_all(arguments.build / "benchmarks/ranks_benchmark", arguments.rounds)
        print_tables(results)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(results, indent=1))
    print_model(model)
    if arguments.plot:
        draw(model, arguments.plot)


if __name__ == "__main__":
    main()
