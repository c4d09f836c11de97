"""Speed of keyfold on the CPU beside PyTorch, MLX and ggml and the machine's limits, as tables.

All compute tensors of the same sizes in the same run, PyTorch, MLX and keyfold in turns; each
figure is the median of the rounds. The limits are those of `keyfold bench` and a float32 product of
OpenBLAS, NumPy's, which OPENBLAS_CORETYPE=Haswell keeps to AVX2 as KEYFOLD_CPU_ISA=avx2 keeps
keyfold. `--json FILE` writes what roofline.py draws.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import keyfold
import keyfold.torch
import numpy as np
import torch
from cases import Call, Case, medians, print_head, print_row
from threadpoolctl import threadpool_limits

try:
    import keyfold.mlx
    import mlx.core as mx
except ImportError:
    mx = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def seconds(call: Call) -> float:
    """Time one call, warm, when no other library's threads spin; short ones fill 20 ms."""
    time.sleep(0.05)
    start = time.perf_counter()
    call()
    repeats = max(1, int(0.02 / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most, in GFLOP/s and GB/s."""

    multiply_adds: float  # of float32, in registers
    pairs: float  # of bfloat16, summed in float32, in registers; 0: it has no instruction for them
    sgemm: float  # OpenBLAS' product of 2,048 x 2,048 matrices
    read: float  # from memory

    def least_seconds(self, case: Case) -> float:
        """Give the time below which no call with float32 arithmetic can be."""
        return max(case.flops / self.multiply_adds, case.key_bytes / self.read) / 1e9


def measure_limits(threads: int) -> Limits:
    """Measure them with this many threads."""
    command = [sys.executable, "-m", "keyfold", "bench", "--json", "--kv-len", "4K"]
    machine = json.loads(subprocess.check_output([*command, "--threads", str(threads)]))["machine"]
    a, b = np.random.default_rng(1).standard_normal((2, 2048, 2048), dtype=np.float32)
    product = statistics.median(seconds(partial(np.matmul, a, b)) for _ in range(5))
    return Limits(
        machine["fma_gflops"],
        machine["bfloat16_gflops"],
        2 * 2048**3 / product / 1e9,
        machine["read_gbs"],
    )


def torch_call(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
    """PyTorch's attention."""
    return partial(
        torch.nn.functional.scaled_dot_product_attention,
        *(q, k, v),
        is_causal=case.causal,
        enable_gqa=case.heads != case.kv_heads,
    )


def mlx_call(case: Case, *tensors: torch.Tensor) -> Call:
    """MLX's attention."""
    dtype = getattr(mx, case.dtype_name)
    q, k, v = (mx.array(tensor.float().numpy()).astype(dtype) for tensor in tensors)
    mx.eval(q, k, v)
    how: dict[str, Any] = {"scale": case.dim**-0.5, "mask": "causal" if case.causal else None}
    return lambda: mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, **how))


def ggml_seconds(program: Path, case: Case, rounds: int) -> float:
    """Time ggml, in a process of its own."""
    command = [
        *(str(program), "--benchmark_format=json", "--benchmark_filter=/ggml"),
        *(f"--benchmark_repetitions={rounds}", "--benchmark_min_time=0.05"),
        f"{case.heads}/{case.kv_heads}/{case.q_len}/{case.kv_len}/{case.dim}/{case.dtype_name}",
    ]
    output = json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL))
    return next(
        row["real_time"] / 1e3  # milliseconds
        for row in output["benchmarks"]
        if row.get("aggregate_name") == "median"
    )


@dataclass
class Bench:
    """A run: its settings, its limits, and what has been measured."""

    threads: int
    rounds: int
    mlx: bool
    ggml: Path | None
    limits: Limits
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def libraries(self) -> list[str]:
        """All that may be timed, keyfold last."""
        mlx = ["MLX"] if self.mlx else []
        return ["PyTorch", *mlx, *(["ggml"] if self.ggml else []), "keyfold"]

    def times(self, case: Case) -> dict[str, float]:
        """Time every library's call, in seconds."""
        q, k, v = case.tensors("cpu")
        ours = partial(
            keyfold.torch.scaled_dot_product_attention,
            *(q, k, v),
            is_causal=case.causal,
            enable_gqa=case.heads != case.kv_heads,
        )
        calls = {"PyTorch": torch_call(case, q, k, v), "keyfold": ours}
        # Which takes seconds for what the others do in a tenth of one.
        if self.mlx and case.flops < 2e10:
            calls["MLX"] = mlx_call(case, q, k, v)
        result = medians(calls, self.rounds, seconds)
        if self.ggml and not case.causal:
            result["ggml"] = ggml_seconds(self.ggml, case, self.rounds)
        return result

    def measure(self, table: str, case: Case) -> dict[str, float]:
        """Time a case and keep the figures."""
        times = self.times(case)
        self.rows.append(
            {
                "table": table,
                "case": str(case),
                "dtype": case.dtype_name,
                "flops": case.flops,
                "bytes": case.key_bytes,
                "seconds": times,
            }
        )
        return times


def shown(times: dict[str, float], libraries: list[str], work: float, form: str) -> list[str]:
    """Give each library's rate, or a dash."""
    return [f"{work / times[name]:{form}}" if name in times else "-" for name in libraries]


def against(times: dict[str, float]) -> str:
    """Give how many times as fast as the fastest peer keyfold is."""
    best = min(value for name, value in times.items() if name != "keyfold")
    return f"{best / times['keyfold']:.2f}"


def prefill_cases() -> Iterator[Case]:
    """Yield calls of many rows: beside a cache of keys, and causal ones."""
    for dtype in DTYPES:
        for dim in (64, 128, 256):
            yield Case(8, 2, 512, 8192, dim, dtype=dtype)
            yield Case(8, 2, 2048, 2048, dim, dtype=dtype, causal=True)
        yield Case(8, 2, 512, 32768, dtype=dtype)


def print_prefill(bench: Bench) -> None:
    """Print rates of many rows and what they are of the limits."""
    print("\nPrefill, GFLOP/s of visible pairs")
    limits = ("of float32 multiply-adds", "of OpenBLAS", "of bfloat16 pairs")
    print_head("call", *bench.libraries, "to the fastest peer", *limits)
    for case in prefill_cases():
        times = bench.measure("prefill", case)
        rate = case.flops / times["keyfold"] / 1e9
        pairs = bench.limits.pairs if case.dtype == torch.bfloat16 else 0
        print_row(
            str(case),
            *shown(times, bench.libraries, case.flops / 1e9, ".0f"),
            against(times),
            f"{rate / bench.limits.multiply_adds:.0%}",
            f"{rate / bench.limits.sgemm:.0%}",
            f"{rate / pairs:.0%}" if pairs else "-",
        )


def decode_cases() -> Iterator[Case]:
    """Yield calls of one row in groups of 1, 4 and 8."""
    for dtype in DTYPES:
        for group in (1, 4, 8):
            for length in (8192, 65536):
                yield Case(8 * group, 8, 1, length, dtype=dtype)


def print_decode(bench: Bench) -> None:
    """Print how fast keys and values pass."""
    print("\nDecode, GB/s of k and v, each counted once")
    print_head("call", *bench.libraries, "to the fastest peer", "of read bandwidth")
    for case in decode_cases():
        times = bench.measure("decode", case)
        print_row(
            str(case),
            *shown(times, bench.libraries, case.key_bytes / 1e9, ".1f"),
            against(times),
            f"{case.key_bytes / times['keyfold'] / 1e9 / bench.limits.read:.0%}",
        )


def print_short(bench: Bench) -> None:
    """Print calls in which little is computed."""
    print("\nShort calls, microseconds")
    print_head("call", *bench.libraries, "to the fastest peer")
    for sizes in ((1, 128), (16, 16), (1, 1024)):
        for dtype in DTYPES:
            case = Case(32, 8, *sizes, dtype=dtype)
            times = bench.measure("short", case)
            micro = {name: 1e-6 / value for name, value in times.items()}
            cells = [f"{1 / micro[name]:.0f}" if name in micro else "-" for name in bench.libraries]
            print_row(str(case), *cells, against(times))


def option_calls(case: Case) -> dict[str, tuple[Call, float]]:
    """Give calls with each option, and the share of pairs that they see."""
    q, k, v = case.tensors("cpu")
    rows, keys = case.q_len, case.kv_len
    apart = torch.rand(rows, keys) < 0.5
    quarters = [torch.ones(rows // 4, keys // 4, dtype=torch.bool)] * 4
    documents = torch.block_diag(*quarters)
    options: dict[str, tuple[dict[str, Any], float]] = {
        "plain": ({}, 1),
        "causal": ({"causal": True}, replace(case, causal=True).flops / case.flops),
        "window of 1,024": ({"causal": True, "window": (1023, 0)}, 1024 / keys),
        "boolean, half hidden at random": ({"mask": apart}, 1),
        "boolean, four documents": ({"mask": documents}, 0.25),
        "float32, any values": ({"mask": torch.randn(rows, keys)}, 1),
        "softcap": ({"softcap": 50.0}, 1),
        "sinks": ({"sinks": torch.zeros(case.heads)}, 1),
        "lse": ({"return_lse": True}, 1),
    }
    return {
        name: (partial(keyfold.scaled_dot_product_attention, q, k, v, **how), share)
        for name, (how, share) in options.items()
    }


def print_options(bench: Bench) -> None:
    """Print what options and small head sizes cost for a visible pair, relative to a plain call."""
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(8, 2, 512, 8192, dtype=dtype)
        calls = option_calls(case)
        for dim in (32, 40, 64, 80, 96):
            small = replace(case, dim=dim)
            q, k, v = small.tensors("cpu")
            call = partial(keyfold.scaled_dot_product_attention, q, k, v)
            calls[f"D {dim}, of its flops"] = (call, small.flops / case.flops)
        times = medians({name: call for name, (call, _) in calls.items()}, bench.rounds, seconds)
        print(f"\nOptions, {case}")
        print_head("option", "ms", "time of a visible pair")
        for name, value in times.items():
            relative = value / calls[name][1] / times["plain"]
            print_row(name, f"{1e3 * value:.1f}", f"{relative:.2f}")


def print_threads(bench: Bench) -> None:
    """Print how speed grows with threads, as a share of linear growth."""
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= bench.threads]
    print("\nThreads: GFLOP/s or GB/s, and the share of linear growth")
    print_head("call", *(str(n) for n in counts))
    for case in (
        *(Case(8, 2, 512, 8192, dtype=dtype) for dtype in DTYPES),
        *(Case(32, 8, 1, 65536, dtype=dtype) for dtype in DTYPES),
    ):
        q, k, v = case.tensors("cpu")
        calls = {
            str(n): partial(keyfold.scaled_dot_product_attention, q, k, v, num_threads=n)
            for n in counts
        }
        times = medians(calls, bench.rounds, seconds)
        work = case.key_bytes if case.q_len == 1 else case.flops
        cells = [
            f"{work / times[str(n)] / 1e9:,.1f} ({times['1'] / times[str(n)] / n:.0%})"
            for n in counts
        ]
        print_row(str(case), *cells)


TABLES = {
    "prefill": print_prefill,
    "decode": print_decode,
    "short": print_short,
    "options": print_options,
    "threads": print_threads,
}


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-mlx", action="store_true", help="leave MLX out, which is slow")
    parser.add_argument("--ggml", type=Path, metavar="attention_benchmark", help="built with ggml")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("table", nargs="*", metavar="table", help=f"of {', '.join(TABLES)}")
    args = parser.parse_args()
    if unknown := set(args.table) - set(TABLES):
        parser.error(f"no such table: {', '.join(sorted(unknown))}")
    os.environ["KEYFOLD_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    with threadpool_limits(args.threads):
        limits = measure_limits(args.threads)
        bench = Bench(args.threads, args.rounds, mx and not args.no_mlx, args.ggml, limits)
        kernel = keyfold.plan(q_len=1, kv_len=1, head_dim=1, backend="cpu").kernel
        print(
            f"{args.threads} threads, kernel {kernel}, PyTorch {torch.__version__}. Limits: "
            f"{limits.multiply_adds:,.0f} GFLOP/s of float32 multiply-adds, {limits.pairs:,.0f} of "
            f"bfloat16 pairs, {limits.sgemm:,.0f} of OpenBLAS' sgemm; {limits.read:.1f} GB/s read",
            flush=True,
        )
        for name in args.table or TABLES:
            TABLES[name](bench)
    if args.json:
        kept = {"threads": args.threads, "kernel": kernel, "limits": vars(limits)}
        args.json.write_text(json.dumps({**kept, "rows": bench.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
