"""What a call will do, and the devices that can do it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _keyfold
from ._options import Window, integer, native_options
from ._records import Chunk, Device, Plan


def plan(
    *,
    q_len: int,
    kv_len: int,
    head_dim: int,
    num_heads: int = 1,
    num_kv_heads: int | None = None,
    value_dim: int | None = None,
    batch: int = 1,
    dtype: str = "float32",
    causal: bool = False,
    q_offset: int | None = None,
    window: Window | None = None,
    kv_lens: Sequence[int] | Any = None,
    backend: str | None = None,
    budget_ms: float | None = None,
    chunk_size: int | None = None,
    chunk_threshold: int | None = None,
    max_scratch_bytes: int | None = None,
    num_threads: int | None = None,
) -> Plan:
    """Show how a call of a shape would be cut, and the memory it would take.

    Parameters
    ----------
    q_len, kv_len, head_dim, num_heads, num_kv_heads, value_dim, batch : int
        The shape. `num_kv_heads` is num_heads by default, `value_dim` head_dim.
    dtype : str, optional
        "float32", "float16" or "bfloat16".
    causal, q_offset, window, kv_lens
        What is visible, as in :func:`scaled_dot_product_attention`.
    backend, budget_ms, chunk_size, chunk_threshold, max_scratch_bytes, num_threads
        How to run it, as in :func:`scaled_dot_product_attention`.

    Returns
    -------
    Plan
        A paced plan's chunks are cut for an estimated speed; the run adapts them.

    Raises
    ------
    InvalidArgument, UnsupportedError
        What the call itself would raise for the shape and the options.

    Examples
    --------
    >>> import keyfold
    >>> keyfold.plan(q_len=1, kv_len=1_000_000, head_dim=128, chunk_size=65536).keys_per_chunk
    65536
    """
    if not isinstance(dtype, str):
        raise TypeError(f"dtype: expected a name, got {dtype!r}")
    options = native_options(
        causal=causal,
        q_offset=q_offset,
        window=window,
        kv_lens=kv_lens,
        backend=backend,
        budget_ms=budget_ms,
        chunk_size=chunk_size,
        chunk_threshold=chunk_threshold,
        max_scratch_bytes=max_scratch_bytes,
        num_threads=num_threads,
    )
    fields = _keyfold.plan(
        batch=integer("batch", batch),
        num_heads=integer("num_heads", num_heads),
        num_kv_heads=integer("num_kv_heads", num_heads if num_kv_heads is None else num_kv_heads),
        q_len=integer("q_len", q_len),
        kv_len=integer("kv_len", kv_len),
        head_dim=integer("head_dim", head_dim),
        value_dim=integer("value_dim", head_dim if value_dim is None else value_dim),
        dtype=dtype,
        options=options,
    )
    return Plan(*(*fields[:-1], tuple(Chunk(*chunk) for chunk in fields[-1])))


def devices() -> list[Device]:
    """The devices that can run attention here, the default one first."""
    return [Device(*fields) for fields in _keyfold.devices()]


def shard_keys(
    kv_len: int, num_ranks: int, rank: int, split_len: int, stripe_len: int = 0
) -> list[tuple[int, int]]:
    """The keys of one rank of a :class:`keyfold.mpi.ContextParallel`.

    Parameters
    ----------
    kv_len : int
        Keys of all ranks.
    num_ranks, rank : int
        Ranks, and which of them.
    split_len : int
        As :func:`plan` tells it: shares are whole splits.
    stripe_len : int, optional
        0: equal shares, contiguous in the order of the ranks. Else stripes of so many keys, a
        multiple of `split_len`, that the ranks take in turn, which balances causal work.

    Returns
    -------
    list of (begin, end)
        Keys by absolute position, ascending.

    Raises
    ------
    InvalidArgument
        A ValueError that names the argument.

    Examples
    --------
    >>> import keyfold
    >>> keyfold.shard_keys(10_000, num_ranks=2, rank=1, split_len=512)
    [(5120, 10000)]
    >>> keyfold.shard_keys(10_000, num_ranks=2, rank=1, split_len=512, stripe_len=2048)
    [(2048, 4096), (6144, 8192)]
    """
    return _keyfold.shard_keys(
        integer("kv_len", kv_len),
        integer("num_ranks", num_ranks),
        integer("rank", rank),
        integer("split_len", split_len),
        integer("stripe_len", stripe_len),
    )


def shard_rows(q_len: int, num_ranks: int, rank: int, row_stripe_len: int) -> list[tuple[int, int]]:
    """The query rows of one rank of a :class:`keyfold.mpi.ContextParallel`, in stripes.

    Parameters
    ----------
    q_len : int
        Rows of all ranks.
    num_ranks, rank : int
        Ranks, and which of them.
    row_stripe_len : int
        Rows of a stripe. The ranks take them in turn, there and back (0, 1, ... n-1, n-1, ... 0):
        with two stripes for each, of ``q_len / (2 * num_ranks)`` rows, causal work is the same on
        all.

    Returns
    -------
    list of (begin, end)
        Rows by their number among all, ascending.

    Raises
    ------
    InvalidArgument
        A ValueError that names the argument.

    Examples
    --------
    >>> import keyfold
    >>> keyfold.shard_rows(8000, num_ranks=2, rank=0, row_stripe_len=2000)
    [(0, 2000), (6000, 8000)]
    """
    return _keyfold.shard_rows(
        integer("q_len", q_len),
        integer("num_ranks", num_ranks),
        integer("rank", rank),
        integer("row_stripe_len", row_stripe_len),
    )
