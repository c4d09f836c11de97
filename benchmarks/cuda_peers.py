"""Speed of keyfold on a CUDA device beside PyTorch's attention, as Markdown tables.

All compute the same tensors in the same run, in turns; each figure is the median of the rounds, by
CUDA events around a call that the host has queued before the device begins: what the host takes is
in a table of its own. The device's limits are a copy and a matrix product by PyTorch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import keyfold
import keyfold.torch
import torch
from cases import Call, Case, medians, print_head, print_row
from torch.nn.attention import SDPBackend, sdpa_kernel

PEERS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def milliseconds(call: Call) -> float:
    """Time one call on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host runs ahead
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def calls_of(case: Case, peers: tuple[str, ...]) -> dict[str, Call]:
    """Give PyTorch's backends and keyfold on one set of tensors."""
    q, k, v = case.tensors("cuda")
    gqa = case.heads != case.kv_heads

    def peer(backend: SDPBackend) -> Call:
        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=case.causal, enable_gqa=gqa
                )

        return call

    def ours() -> torch.Tensor:
        return keyfold.torch.scaled_dot_product_attention(
            q, k, v, is_causal=case.causal, enable_gqa=gqa
        )

    return {name: peer(PEERS[name]) for name in peers} | {"keyfold": ours}


def print_table(
    title: str, cases: Iterator[Case], peers: tuple[str, ...], unit: str, rounds: int
) -> None:
    """Print a row for each case, in TFLOP/s or GB/s."""
    print(f"\n{title}, {unit}")
    print_head("call", *peers, "keyfold", "of the fastest peer")
    for case in cases:
        work = case.flops / 1e9 if unit == "TFLOP/s" else case.key_bytes / 1e6
        times = medians(calls_of(case, peers), rounds, milliseconds)
        rates = {name: work / ms for name, ms in times.items()}
        best = max((rates[name] for name in peers if name in rates), default=0)
        shown = [f"{rates[name]:.0f}" if name in rates else "-" for name in (*peers, "keyfold")]
        ratio = f"{rates['keyfold'] / best:.2f}" if best and "keyfold" in rates else "-"
        print_row(str(case), *shown, ratio)


def print_masks(case: Case, rounds: int) -> None:
    """Print what each option costs for a visible pair, relative to the call without it."""
    q, k, v = case.tensors("cuda")
    rows, keys = case.q_len, case.kv_len
    boolean = torch.ones(rows, keys, dtype=torch.bool, device="cuda")
    apart = torch.rand(rows, keys, device="cuda") < 0.5
    documents = torch.block_diag(*[boolean[: rows // 4, : keys // 4]] * 4)
    zeros = torch.zeros(rows, keys, device="cuda")
    options: dict[str, tuple[dict[str, Any], float]] = {
        "plain": ({}, 1),
        "causal": ({"causal": True}, replace(case, causal=True).flops / case.flops),
        "window of 4,096": ({"causal": True, "window": (4095, 0)}, 4096 / keys),
        "boolean, all seen": ({"mask": boolean}, 1),
        "boolean, half hidden at random": ({"mask": apart}, 1),
        "boolean, four documents": ({"mask": documents}, 0.25),
        "float32, 0 and -Inf at random": ({"mask": zeros.masked_fill(apart, -torch.inf)}, 1),
        "float32, four documents": ({"mask": zeros.masked_fill(~documents, -torch.inf)}, 0.25),
        "float32, any values": ({"mask": torch.randn(rows, keys, device="cuda")}, 1),
        "bfloat16, any values": ({"mask": torch.randn_like(zeros, dtype=torch.bfloat16)}, 1),
        "softcap": ({"softcap": 50.0}, 1),
        "sinks": ({"sinks": torch.zeros(case.heads, device="cuda")}, 1),
        "kv_lens": ({"kv_lens": [keys // 2] * case.batch}, 0.5),
        "lse": ({"return_lse": True}, 1),
    }
    calls = {
        name: (lambda how=how: keyfold.scaled_dot_product_attention(q, k, v, **how))
        for name, (how, _) in options.items()
    }
    times = medians(calls, rounds, milliseconds)
    print(f"\n{case}")
    print_head("option", "ms", "time of a visible pair")
    for name, ms in times.items():
        print_row(name, f"{ms:.2f}", f"{ms / options[name][1] / times['plain']:.2f}")


def print_host(rounds: int) -> None:
    """Print how long a call of one dispatch takes the host, queued behind others."""
    print("\nThe host's time, microseconds a call")
    print_head("call", "cuDNN", "flash", "keyfold")
    for case in (Case(32, 8, 1, 1024), Case(32, 8, 512, 8192)):
        shown = []
        for call in calls_of(case, ("cuDNN", "flash")).values():
            call()
            times = []
            for _ in range(rounds):
                torch.cuda.synchronize()
                torch.cuda._sleep(20_000_000)
                begin = time.perf_counter()
                for _ in range(20):
                    call()
                times.append((time.perf_counter() - begin) / 20)
            shown.append(f"{1e6 * statistics.median(times):.0f}")
        print_row(str(case), *shown)


def print_limits() -> None:
    """Print the device, its copy bandwidth and its matrix rate."""
    source = torch.empty(2**31, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = medians(calls, 9, milliseconds)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, ", end="")
    print(f"cuDNN {torch.backends.cudnn.version()}: ", end="")
    print(f"copies {2 * source.numel() / times['copy'] / 1e6:,.0f} GB/s, ", end="")
    print(f"bfloat16 products {2 * 8192**3 / times['product'] / 1e9:.0f} TFLOP/s", flush=True)


def prefill() -> Iterator[Case]:
    """Yield square calls, and rows behind a long cache."""
    for length in (8192, 16384):
        for dim in (64, 128, 256):
            for causal in (False, True):
                yield Case(16, 16, length, length, dim, causal=causal)
    for dim in (128, 256):
        yield Case(32, 8, 2048, 131072, dim)
    yield Case(8, 8, 16384, 16384, dtype=torch.float16)


def few_rows() -> Iterator[Case]:
    """Yield calls of some rows against many keys."""
    for rows in (16, 64, 128, 256, 512):
        yield Case(32, 8, rows, 131072)


def odd_dims() -> Iterator[Case]:
    """Yield head sizes that are no powers of two, and those beyond 256."""
    for dim, columns in ((40, 0), (72, 0), (80, 0), (96, 0), (192, 0), (192, 128), (512, 0)):
        yield Case(16, 16, 8192, 8192, dim, columns)


def single() -> Iterator[Case]:
    """Yield float32 calls."""
    for dim in (64, 128, 256):
        yield Case(8, 8, 8192, 8192, dim, dtype=torch.float32)


def decode() -> Iterator[Case]:
    """Yield calls of one row, over lengths, batches, groups and head sizes."""
    for length in (1024, 8192, 32768, 65536, 131072, 262144, 1048576):
        yield Case(32, 8, 1, length)
    for batch, length in ((8, 65536), (16, 8192), (64, 8192)):
        yield Case(32, 8, 1, length, batch=batch)
    for heads in (8, 16, 64, 128):
        yield Case(heads, 8, 1, 131072)
    for dim in (64, 80, 256):
        yield Case(32, 8, 1, 131072, dim)
    yield Case(32, 8, 8, 131072)
    yield Case(32, 8, 1, 131072, dtype=torch.float32)


def main() -> None:
    """Print the tables that are asked for."""
    tables = {
        "prefill": ("Prefill", prefill, ("cuDNN", "flash"), "TFLOP/s"),
        "few_rows": ("Few rows", few_rows, ("cuDNN", "flash"), "TFLOP/s"),
        "odd_dims": ("Other head sizes", odd_dims, ("cuDNN", "flash"), "TFLOP/s"),
        "float32": ("Float32", single, ("efficient",), "TFLOP/s"),
        "decode": ("Decode", decode, ("cuDNN", "flash"), "GB/s"),
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("table", nargs="*", default=[*tables, "masks", "host"])
    args = parser.parse_args()
    print_limits()
    for name in args.table:
        if name == "masks":
            print_masks(Case(32, 8, 4096, 32768), args.rounds)
            continue
        if name == "host":
            print_host(args.rounds)
            continue
        title, cases, peers, unit = tables[name]
        print_table(title, cases(), peers, unit, args.rounds)


if __name__ == "__main__":
    main()
