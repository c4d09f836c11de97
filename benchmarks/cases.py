"""What the benchmarks in Python share: a call's sizes and work, timing in turns, tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """Sizes of one call."""

    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int = 128
    value_dim: int = 0  # 0: as dim
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    causal: bool = False

    @property
    def columns(self) -> int:
        """Width of a value."""
        return self.value_dim or self.dim

    @property
    def flops(self) -> float:
        """Multiply-adds of visible pairs, counted as two."""
        hidden = self.q_len * (self.q_len - 1) / 2 if self.causal else 0
        pairs = self.q_len * self.kv_len - hidden
        return 2 * self.batch * self.heads * pairs * (self.dim + self.columns)

    @property
    def key_bytes(self) -> int:
        """K and V, once."""
        elements = self.batch * self.kv_heads * self.kv_len * (self.dim + self.columns)
        return elements * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """The dtype without its library."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        """Name the sizes."""
        dim = f"{self.dim}" if self.columns == self.dim else f"{self.dim}/{self.columns}"
        batch = f"{self.batch} x " if self.batch > 1 else ""
        causal = ", causal" if self.causal else ""
        sizes = f"{self.heads}/{self.kv_heads}, {self.q_len:,} x {self.kv_len:,}"
        return f"{batch}{sizes}, D {dim}, {self.dtype_name}{causal}"

    def tensors(self, device: str) -> list[torch.Tensor]:
        """Make q, k and v of normally distributed numbers."""
        sizes = [
            (self.batch, self.heads, self.q_len, self.dim),
            (self.batch, self.kv_heads, self.kv_len, self.dim),
            (self.batch, self.kv_heads, self.kv_len, self.columns),
        ]
        return [torch.randn(size, dtype=self.dtype, device=device) for size in sizes]


def medians(
    calls: dict[str, Call], rounds: int, timer: Callable[[Call], float]
) -> dict[str, float]:
    """Time the calls in turns, after one round to warm up; without those that refuse."""
    able = {}
    for name, call in calls.items():
        try:
            timer(call)
            able[name] = call
        except (RuntimeError, ValueError):
            pass
    times: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(rounds):
        for name, call in able.items():
            times[name].append(timer(call))
    return {name: statistics.median(column) for name, column in times.items()}


def print_head(*columns: str) -> None:
    """Print the first two lines of a table."""
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")


def print_row(*cells: str) -> None:
    """Print a line of a table."""
    print(f"| {' | '.join(cells)} |", flush=True)
