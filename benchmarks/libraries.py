"""Speed of keyfold's stand-ins beside the originals of PyTorch and MLX, as a Markdown table.

Both compute the same data in the same run, in turns; each figure is the median of the rounds. The
machine's limits are those that `keyfold bench` measures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import keyfold.mlx
import keyfold.torch
import mlx.core as mx
import torch

DTYPES = ("float32", "float16", "bfloat16")
# name: query heads, key heads, q_len, kv_len; head_dim is 128
CALLS = {
    "prefill": (8, 2, 512, 8192),
    "decode": (32, 8, 1, 65_536),
    "short decode": (32, 8, 1, 128),
}
HEAD_DIM = 128


def torch_calls(sizes: list[tuple[int, ...]], dtype: str) -> tuple[Callable[[], Any], ...]:
    """PyTorch's attention and keyfold's, on the same tensors."""
    q, k, v = (torch.randn(size).to(getattr(torch, dtype)) for size in sizes)
    original = torch.nn.functional.scaled_dot_product_attention
    ours = keyfold.torch.scaled_dot_product_attention
    return (lambda: original(q, k, v, enable_gqa=True)), (lambda: ours(q, k, v, enable_gqa=True))


def mlx_calls(sizes: list[tuple[int, ...]], dtype: str) -> tuple[Callable[[], Any], ...]:
    """MLX's attention and keyfold's, on the same arrays."""
    q, k, v = (mx.random.normal(size).astype(getattr(mx, dtype)) for size in sizes)
    mx.eval(q, k, v)
    scale = HEAD_DIM**-0.5
    original = mx.fast.scaled_dot_product_attention
    ours = keyfold.mlx.scaled_dot_product_attention
    return (
        lambda: mx.eval(original(q, k, v, scale=scale)),
        lambda: mx.eval(ours(q, k, v, scale=scale)),
    )


def seconds(call: Callable[[], Any]) -> float:
    """Time one call; short ones are repeated to fill 20 ms."""
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    repeats = int(0.02 / once)
    if repeats <= 1:
        return once
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def medians(calls: tuple[Callable[[], Any], ...], rounds: int) -> Iterator[float]:
    """Time the calls in turns, after one round to warm up."""
    for call in calls:
        call()
    times = [[seconds(call) for call in calls] for _ in range(rounds)]
    return (statistics.median(column) for column in zip(*times, strict=True))


def limits() -> tuple[float, float]:
    """Measure float32 multiply-adds in flops a second, and reading in bytes a second."""
    command = [sys.executable, "-m", "keyfold", "bench", "--json", "--kv-len", "4K"]
    machine = json.loads(subprocess.check_output(command))["machine"]
    return 1e9 * machine["fma_gflops"], 1e9 * machine["read_gbs"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    peak, bandwidth = limits()
    print(f"{peak / 1e9:.0f} GFLOP/s of float32 multiply-adds, {bandwidth / 1e9:.1f} GB/s read\n")
    print("| call | dtype | library | original | keyfold | ratio | of the limit |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (heads, kv_heads, q_len, kv_len) in CALLS.items():
        keys = (1, kv_heads, kv_len, HEAD_DIM)
        sizes = [(1, heads, q_len, HEAD_DIM), keys, keys]
        least = 4 * HEAD_DIM * heads * q_len * kv_len / peak
        for dtype in DTYPES:
            moved = 2 * HEAD_DIM * kv_heads * kv_len * getattr(torch, dtype).itemsize
            for library, make in (("PyTorch", torch_calls), ("MLX", mlx_calls)):
                with torch.inference_mode():
                    original, ours = medians(make(sizes, dtype), rounds)
                print(
                    f"| {name} | {dtype} | {library} | {1e3 * original:.3g} ms | "
                    f"{1e3 * ours:.3g} ms | {original / ours:.2f} | "
                    f"{max(least, moved / bandwidth) / ours:.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
