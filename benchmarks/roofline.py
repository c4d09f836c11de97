"""Draw what cpu_peers.py measured under the machine's roofs, as an SVG picture.

usage: python benchmarks/roofline.py figures.json roofline.svg

A point is a call: how many flops it has for a byte of keys and values, and how fast it ran. No call
can be above the roof of its arithmetic: memory's bandwidth on the left, the processor's rate on the
right (the Roofline model of Williams, Waterman and Patterson, 2009).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.use("svg")
LIBRARIES = {"keyfold": "o", "PyTorch": "s", "MLX": "^", "ggml": "D"}
DTYPES = {"float32": "#1f5fa8", "float16": "#2e8b57", "bfloat16": "#c44e1c"}


def draw_roofs(axes: Any, limits: dict[str, float], flops_per_byte: list[float]) -> None:
    """Draw the limits of arithmetic over the calls' range."""
    low, high = min(flops_per_byte) / 2, max(flops_per_byte) * 2
    roofs = {"float32 multiply-adds": limits["multiply_adds"], "bfloat16 pairs": limits["pairs"]}
    for name, roof in roofs.items():
        if not roof:
            continue
        ridge = roof / limits["read"]
        axes.plot([low, ridge, high], [low * limits["read"], roof, roof], color="0.4", linewidth=1)
        axes.annotate(f"{name}, {roof:,.0f}", (high, roof), ha="right", va="bottom", color="0.3")
    middle = (low * limits["multiply_adds"] / limits["read"]) ** 0.5
    axes.annotate(
        f"{limits['read']:.0f} GB/s read",
        *((middle, middle * limits["read"]), (-4, 4)),
        textcoords="offset points",
        ha="right",
        color="0.3",
    )


def draw(figures: dict[str, Any], target: Path) -> None:
    """Draw every call of prefill and decode."""
    # Text as text, and the same file for the same figures.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "keyfold", "font.size": 10})
    rows = [row for row in figures["rows"] if row["table"] in ("prefill", "decode")]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.set(xscale="log", yscale="log", ylabel="GFLOP/s")
    axes.set_xlabel("flops for a byte of keys and values")
    axes.set_title(f"{figures['threads']} threads, kernel {figures['kernel']}")
    for row in rows:
        for library, seconds in row["seconds"].items():
            ours = library == "keyfold"
            color = DTYPES[row["dtype"]]
            axes.plot(
                row["flops"] / row["bytes"],
                row["flops"] / seconds / 1e9,
                LIBRARIES[library],
                color=color,
                markerfacecolor=color if ours else "none",
                markersize=7 if ours else 5,
            )
    draw_roofs(axes, figures["limits"], [row["flops"] / row["bytes"] for row in rows])
    seen = {library for row in rows for library in row["seconds"]}
    for library in filter(seen.__contains__, LIBRARIES):
        fill = "0.3" if library == "keyfold" else "none"
        axes.plot([], [], LIBRARIES[library], color="0.3", markerfacecolor=fill, label=library)
    for dtype, color in DTYPES.items():
        axes.plot([], [], color=color, linewidth=4, label=dtype)
    figure.legend(loc="outside right upper")
    axes.grid(which="major", color="0.9")
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    """Read the figures and write the picture."""
    if len(sys.argv) != 3:
        sys.exit((__doc__ or "").split("\n\n")[1])
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
