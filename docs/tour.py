# %% [markdown]
# # A tour of keyfold in Python
#
# 1. One call, what it reports, and what does not change a bit of its result.
# 2. Keys in files that are larger than the memory this process may use.
# 3. Keys in shards that are attended one by one and merged.
# 4. A needle in a haystack, drawn with matplotlib.
#
# This page is a script and a notebook: run `python docs/tour.py`, or open it in VS Code or, with
# jupytext, in Jupyter. It needs Linux, keyfold, matplotlib, and 1 GiB of disk for temporary files.
# It stops at a claim that does not hold.

# %%
import argparse
import json
import resource
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import reduce
from itertools import permutations, repeat
from pathlib import Path

import keyfold
import numpy as np

parser = argparse.ArgumentParser(description="A tour of keyfold", allow_abbrev=False)
parser.add_argument("--mib", type=int, default=1024, help="keys and values, above 512")
parser.add_argument("--contexts", default="8K,16K,32K", help="needle: bytes of text")
parser.add_argument("--depths", default="10,50,90", help="needle: percent of the text")
parser.add_argument("--figures", type=Path, default=Path("."), help="folder for the plot")
in_notebook = "ipykernel" in sys.modules
args = parser.parse_args([] if in_notebook else None)
rng = np.random.default_rng(2)  # the page computes the same at every run


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


# %% [markdown]
# ## 1. One call
#
# Arrays are `[batch, heads, len, dim]`. Here four query heads share each of two key heads.

# %%
q = rng.standard_normal((1, 8, 64, 64), np.float32)
k, v = rng.standard_normal((2, 1, 2, 50_000, 64), np.float32)

out = keyfold.scaled_dot_product_attention(q, k, v)
report = keyfold.last_report()
print(f"1. One call: output {out.shape}, on {report.backend} {report.kernel}")
print(f"   {report.dispatches} dispatches, the longest {report.longest_dispatch_ms:.1f} ms")

# %% [markdown]
# The keys were cut into dispatches, and the clock decided where. Cut them otherwise, or take
# another number of threads: the bits stay the same.

# %%
for options in ({"chunk_size": 4096}, {"budget_ms": 2}, {"num_threads": 1}):
    again = keyfold.scaled_dot_product_attention(q, k, v, **options)
    assert same_bits(again, out)
    print(f"   same bits with {options}, {keyfold.last_report().dispatches} dispatches")

# %% [markdown]
# `progress` is called after each dispatch (`progress=True` draws a bar). What it raises ends the
# call, and so does Ctrl-C; an output that was passed in is then as it was before.


# %%
def stop_halfway(at: keyfold.Progress) -> None:
    if at.fraction >= 0.5:
        raise KeyboardInterrupt(f"{at.fraction:.0%} done after {at.dispatches} dispatches")


untouched = np.zeros_like(out)
options = {"out": untouched, "chunk_size": 4096, "progress": stop_halfway}
try:
    keyfold.scaled_dot_product_attention(q, k, v, **options)
    raise AssertionError("the callback has not stopped the call")
except KeyboardInterrupt as stop:
    assert not untouched.any()
    print(f"   stopped, {stop}; the output is untouched")
del k, v

# %% [markdown]
# ## 2. More keys than memory
#
# First the files. They are written in small pieces, so the keys are never in memory together, in
# the order in which a cache grows: `[len, heads, dim]`, float16.
#
# One key, the needle, resembles the first query head, and its value spells a sentence, one
# character code per dimension. All others are random. With each piece at hand, we also compute
# the answer in float64, by a streaming softmax.

# %%
MIB = 2**20
HEADS, KV_HEADS, DIM = 8, 2, 128
BYTES_PER_KEY = KV_HEADS * DIM * 2
SENTENCE = "Exact attention, however long the keys."

kv_len = args.mib * MIB // 2 // BYTES_PER_KEY
needle = kv_len * 2 // 3
folder = tempfile.TemporaryDirectory(prefix="keyfold-tour-")
files = [Path(folder.name, name) for name in ("keys.f16", "values.f16")]

q = rng.standard_normal((1, HEADS, 1, DIM), np.float32).astype(np.float16)
rows = q.astype(np.float64).reshape(KV_HEADS, HEADS // KV_HEADS, DIM)
top, total, weighted = np.full((*rows.shape[:2], 1), -np.inf), 0.0, 0.0

with files[0].open("wb") as k_file, files[1].open("wb") as v_file:
    for begin in range(0, kv_len, 8192):
        count = min(8192, kv_len - begin)
        k, v = rng.standard_normal((2, count, KV_HEADS, DIM), np.float32).astype(np.float16)
        if begin <= needle < begin + count:
            k[needle - begin, 0] = 3 * q[0, 0, 0]
            v[needle - begin, 0] = list(SENTENCE.ljust(DIM).encode())
        k.tofile(k_file)
        v.tofile(v_file)

        scores = rows @ k.astype(np.float64).transpose(1, 2, 0) / np.sqrt(DIM)
        new_top = np.maximum(top, scores.max(axis=-1, keepdims=True))
        weights, keep = np.exp(scores - new_top), np.exp(top - new_top)
        total = total * keep + weights.sum(axis=-1, keepdims=True)
        weighted = weighted * keep + weights @ v.astype(np.float64).transpose(1, 0, 2)
        top = new_top

expected = (weighted / total).reshape(1, HEADS, 1, DIM)
expected_lse = (top + np.log(total)).reshape(1, HEADS, 1)
print(f"2. Files: {kv_len} keys, {sum(f.stat().st_size for f in files) // MIB} MiB with values")

# %% [markdown]
# Now the limit. `RLIMIT_AS` bounds all that a process may map: its heap, the stacks of its threads,
# and files too. We allow what is mapped by now, and 256 MiB more (the files: 1024 MiB).


# %%
def memory(field: str) -> int:
    """A line of /proc/self/status in bytes: VmSize is address space, VmHWM peak memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(field + ":")[2].split()[0]) * 1024


@contextmanager
def address_space(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def window(begin: int, end: int) -> list[np.ndarray]:
    """Keys and values [begin, end), mapped; seen as [batch, heads, len, dim] without a copy."""
    shape = (end - begin, KV_HEADS, DIM)
    maps = [np.memmap(file, np.float16, "r", begin * BYTES_PER_KEY, shape) for file in files]
    return [array[None].swapaxes(1, 2) for array in maps]


def stream(sizes: Iterator[int]) -> tuple[np.ndarray, np.ndarray]:
    """Feed one window after another; each is unmapped before the next one is mapped."""
    state = keyfold.AttentionState(q)
    while state.next_key < kv_len:
        state.update(*window(state.next_key, min(state.next_key + next(sizes), kv_len)))
    return state.finish(return_lse=True)


limit = memory("VmSize") + 256 * MIB
with address_space(limit):
    print(f"   limit: {limit // MIB} MiB, of which 256 MiB are free")
    try:
        np.fromfile(files[0], np.float16)
        raise AssertionError("the limit does not hold")
    except MemoryError:
        print("   reading the keys whole: MemoryError")
    try:
        window(0, kv_len)
        raise AssertionError("the limit does not hold")
    except OSError as error:
        print(f"   mapping them whole: {error}")

    out, lse = stream(repeat(16_384))
    print(f"   streaming in windows of 16384 keys: done, peak memory {memory('VmHWM') // MIB} MiB")
    again, again_lse = stream(iter(lambda: int(rng.integers(1, 30_000)), 0))

assert same_bits(again, out) and same_bits(again_lse, lse)
print("   same bits from windows of random sizes")

# %% [markdown]
# The first head has read the needle's sentence; the others average over all keys. Every element is
# as near to float64 as rounding to float16 allows, and a little for sums in float32.

# %%
print("   the needle says:", bytes(out[0, 0, 0].round().astype(np.uint8)).decode().strip())
error = np.abs(out - expected)
assert (error <= 2**-11 * np.abs(expected) + 1e-6).all()
assert np.allclose(lse, expected_lse, rtol=1e-6, atol=0)
print(f"   largest error of the other heads: {error[0, 1:].max():.1e}", end=", ")
print(f"logsumexp {np.abs(lse - expected_lse).max():.1e}")

# %% [markdown]
# ## 3. Shards
#
# When the keys lie in several places, attend to each shard alone and merge the finished results:
# their logsumexps weigh them. Here four threads take a quarter each; keyfold releases the GIL.

# %%
ends = [kv_len * i // 4 for i in range(5)]


def attend(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    return keyfold.scaled_dot_product_attention(q, *window(begin, end), return_lse=True)


with ThreadPoolExecutor(4) as pool:
    shards = list(pool.map(attend, ends[:-1], ends[1:]))
one_call, one_lse = attend(0, kv_len)

merged = [reduce(lambda a, b: keyfold.merge_state(*a, *b), o) for o in permutations(shards)]
outs, lses = (np.stack(parts) for parts in zip(*merged, strict=True))
assert np.allclose(outs, one_call, rtol=2**-9, atol=1e-5)
assert np.allclose(lses, one_lse, rtol=1e-6, atol=0)
print(f"3. Four shards, merged in all {len(merged)} orders, against one call:")
print(f"   largest difference: {np.abs(outs - one_call)[:, 0, 1:].max():.1e}", end=", ")
print(f"logsumexp {np.abs(lses - one_lse).max():.1e}")

# %% [markdown]
# A merge is exact up to rounding: each shard's output was rounded to float16 already.
# `AttentionState` keeps float32 and the order of one call, so the stream of section 2 has the very
# bits of this one call (which maps both files whole: the limit is lifted).
# keyfold's logsumexp is a natural logarithm. Multiply that of a library that uses base 2 by ln 2.

# %%
assert same_bits(out, one_call) and same_bits(lse, one_lse)
print("   the stream of section 2 has the bits of one call")
folder.cleanup()

# %% [markdown]
# ## 4. The needle plot
#
# `keyfold needle` hides a fact in real text, each byte of which is a key and a value, and lets
# attention find it. Text of Python's own standard library is at hand wherever this page runs.

# %%
text = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
command = [sys.executable, "-m", "keyfold", "needle", "--json", *map(str, text)]
command += ["--context", args.contexts, "--depths", args.depths]
ran = subprocess.run(command, stdout=subprocess.PIPE, check=True)  # a wrong answer would exit by 1
results = json.loads(ran.stdout)["results"]
longest = max(r["longest_dispatch_ms"] for r in results)
hits = sum(r["passed"] for r in results)
statement = f"{hits} of {len(results)} needles found; longest dispatch {longest:.0f} ms"
print(f"4. {statement}")

# %% [markdown]
# Time grows with the context. The longest dispatch need not: keyfold aims at a budget, by default
# 100 ms. This is what a GPU's watchdog and a person at the same display care about.

# %%
try:
    import matplotlib
except ImportError:
    sys.exit("The plot needs matplotlib: python -m pip install matplotlib")
if not in_notebook:
    matplotlib.use("Agg")  # draws without a display
from matplotlib import pyplot as plt  # noqa: E402

cells = {(r["depth_percent"], r["context"]): r for r in results}
depths, contexts = (sorted(set(values)) for values in zip(*cells, strict=True))
times = [cells[d, c]["prefill_ms"] + cells[d, c]["decode_ms"] for d in depths for c in contexts]
seconds = np.reshape(times, (len(depths), len(contexts))) / 1000

figure, axes = plt.subplots(figsize=(6.8, 2 + 0.6 * len(depths)), layout="constrained")
# cividis reads the same with and without colour blindness.
mesh = axes.pcolormesh(seconds, cmap="cividis", norm="log", edgecolors="white", linewidth=2)
for (y, x), value in np.ndenumerate(seconds):
    label = f"{value:.1f} s\n{cells[depths[y], contexts[x]]['longest_dispatch_ms']:.0f} ms"
    color = "white" if mesh.norm(value) < 0.45 else "black"
    axes.text(x + 0.5, y + 0.5, label, ha="center", va="center", color=color)
axes.set_xticks(np.arange(len(contexts)) + 0.5, [f"{n // 1024}K" for n in contexts])
axes.set_yticks(np.arange(len(depths)) + 0.5, depths)
axes.set(title=statement, ylabel="depth in the text (%)")
legend = "in each cell: time of all attention calls (the colour, too), longest dispatch"
axes.set_xlabel(f"context (bytes of text, each a key and a value)\n\n{legend}")
axes.tick_params(length=0)
axes.spines[:].set_visible(False)
axes.invert_yaxis()

plot = args.figures / "needle_matplotlib.svg"
args.figures.mkdir(parents=True, exist_ok=True)
# Text stays text, and the same data give the same file.
with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "keyfold"}):
    figure.savefig(plot, metadata={"Date": None, "Creator": None})
print(f"   drawn: {plot}")
