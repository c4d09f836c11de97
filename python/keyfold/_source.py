"""Keys and values in files, as sources that read ahead of the computation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from . import _keyfold
from ._arrays import Results, check_tensors
from ._errors import InvalidArgument
from ._options import ProgressArgument, Window, integer, native_options, watched

AHEAD_BYTES = 128 << 20
NUM_THREADS = 4


class KeyValueSource:
    """Keys and values that are not arrays: :func:`open_source` and :class:`KvStore` give them.

    Attributes
    ----------
    shape : tuple of int
        batch, num_kv_heads, head_dim and value_dim.
    dtype : str
        "float32", "float16" or "bfloat16".
    """

    def __init__(self, native: _keyfold.Source) -> None:
        self._source = native
        *shape, self.dtype = native.shape
        self.shape: tuple[int, ...] = tuple(shape)

    @property
    def size(self) -> int:
        """Keys that are there now."""
        return self._source.size

    @property
    def grows(self) -> bool:
        """Whether more keys may come than `size` says."""
        return self._source.grows

    def attend(
        self,
        q: Any,
        *,
        scale: float | None = None,
        mask: Any = None,
        causal: bool = False,
        q_offset: int | None = None,
        window: Window | None = None,
        softcap: float | None = None,
        sinks: Any = None,
        kv_lens: Sequence[int] | Any = None,
        return_lse: bool = False,
        out: Any = None,
        backend: str | None = None,
        budget_ms: float | None = None,
        chunk_size: int | None = None,
        chunk_threshold: int | None = None,
        max_scratch_bytes: int | None = None,
        num_threads: int | None = None,
        progress: ProgressArgument = None,
    ) -> Any:
        """Attention over these keys: the formula and the bits of the call over arrays.

        Parameters
        ----------
        q : array, [batch, num_heads, q_len, head_dim]
            Queries, as in :func:`scaled_dot_product_attention`, in host memory.
        scale, mask, causal, window, softcap, sinks, kv_lens, return_lse, out
            As in :func:`scaled_dot_product_attention`.
        q_offset : int, optional
            Key position of query row 0. Needed with `causal` and `window` where the source grows.
        backend, budget_ms, chunk_size, chunk_threshold, max_scratch_bytes, num_threads, progress
            As in :func:`scaled_dot_product_attention`.

        Returns
        -------
        out : array, [batch, num_heads, q_len, value_dim]
            Of the library and dtype of `q`; or `out`.
        lse : array, [batch, num_heads, q_len]
            With `return_lse`: float32, natural logarithm, sinks included.

        Raises
        ------
        InvalidArgument
            A ValueError that names the argument; also for a second call while one runs.
        IoError
            An OSError: a file was truncated meanwhile, or can't be read, or the wait was too long.
            After any exception, `out` is as it was before.
        KeyboardInterrupt
            On Ctrl-C, at the end of the dispatch that runs, or while waiting for keys.

        Notes
        -----
        Reads what some row sees, once for each block of rows whose state fits in
        `max_scratch_bytes`. The GIL is released.
        """
        check_tensors(q=q, mask=mask, sinks=sinks)
        options = native_options(
            scale=scale,
            mask=mask,
            causal=causal,
            q_offset=q_offset,
            window=window,
            softcap=softcap,
            sinks=sinks,
            kv_lens=kv_lens,
            backend=backend,
            budget_ms=budget_ms,
            chunk_size=chunk_size,
            chunk_threshold=chunk_threshold,
            max_scratch_bytes=max_scratch_bytes,
            num_threads=num_threads,
        )
        shape, dtype = _keyfold.shape_and_dtype(q, "q")
        results = Results(q, (*shape[:-1], self.shape[-1]), dtype, out=out, with_lse=return_lse)
        with watched(progress) as callback:
            self._source.attend(q, results.out, results.lse, options, callback)
        return results.deliver()


def open_source(
    k: str | os.PathLike[str],
    v: str | os.PathLike[str],
    *,
    layout: str = "bhld",
    ahead_bytes: int = AHEAD_BYTES,
    num_threads: int = NUM_THREADS,
) -> KeyValueSource:
    """Open keys and values in .npy or .safetensors files, which may exceed memory.

    Parameters
    ----------
    k, v : path
        PATH or PATH.safetensors:TENSOR; [batch, num_kv_heads, kv_len, dim]. Axes that are missing
        on the left count as 1.
    layout : {"bhld", "blhd"}, optional
        Order of the files' axes; "blhd" is [batch, kv_len, num_kv_heads, dim].
    ahead_bytes : int, optional
        Bytes that are mapped or read at a time.
    num_threads : int, optional
        Threads that read, 1 to 64.

    Returns
    -------
    source : KeyValueSource
        Reads headers only, until it is used.

    Raises
    ------
    IoError
        An OSError: a file can't be opened.
    InvalidArgument
        A ValueError that names the file: it is malformed, or k and v don't fit together.

    Examples
    --------
    >>> import numpy as np, keyfold, tempfile
    >>> rng = np.random.default_rng(0)
    >>> folder = tempfile.mkdtemp()
    >>> np.save(f"{folder}/k.npy", rng.standard_normal((1, 2, 5000, 64), np.float32))
    >>> np.save(f"{folder}/v.npy", rng.standard_normal((1, 2, 5000, 64), np.float32))
    >>> source = keyfold.open_source(f"{folder}/k.npy", f"{folder}/v.npy")
    >>> source.attend(rng.standard_normal((1, 8, 1, 64), np.float32)).shape
    (1, 8, 1, 64)
    """
    if layout not in ("bhld", "blhd"):
        raise InvalidArgument(f"layout: expected 'bhld' or 'blhd', got {layout!r}")
    return KeyValueSource(
        _keyfold.open_source(
            os.fspath(k),
            os.fspath(v),
            layout == "blhd",
            integer("ahead_bytes", ahead_bytes),
            integer("num_threads", num_threads),
        )
    )
