"""Attention in one call, and the merge of finished results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar, overload

from . import _keyfold
from ._arrays import Results, check_tensors, shape_and_dtype
from ._devices import stream_of
from ._options import ProgressArgument, Window, native_options, watched
from ._records import Report

Array = TypeVar("Array")


@overload
def scaled_dot_product_attention(
    q: Array,
    k: Any,
    v: Any,
    *,
    scale: float | None = ...,
    mask: Any = ...,
    causal: bool = ...,
    q_offset: int | None = ...,
    window: Window | None = ...,
    softcap: float | None = ...,
    sinks: Any = ...,
    kv_lens: Sequence[int] | Any = ...,
    return_lse: Literal[False] = ...,
    out: Any = ...,
    stream: Any = ...,
    backend: str | None = ...,
    budget_ms: float | None = ...,
    chunk_size: int | None = ...,
    chunk_threshold: int | None = ...,
    max_scratch_bytes: int | None = ...,
    num_threads: int | None = ...,
    progress: ProgressArgument = ...,
) -> Array: ...
@overload
def scaled_dot_product_attention(
    q: Array,
    k: Any,
    v: Any,
    *,
    scale: float | None = ...,
    mask: Any = ...,
    causal: bool = ...,
    q_offset: int | None = ...,
    window: Window | None = ...,
    softcap: float | None = ...,
    sinks: Any = ...,
    kv_lens: Sequence[int] | Any = ...,
    return_lse: Literal[True],
    out: Any = ...,
    stream: Any = ...,
    backend: str | None = ...,
    budget_ms: float | None = ...,
    chunk_size: int | None = ...,
    chunk_threshold: int | None = ...,
    max_scratch_bytes: int | None = ...,
    num_threads: int | None = ...,
    progress: ProgressArgument = ...,
) -> tuple[Array, Array]: ...
def scaled_dot_product_attention(
    q: Any,
    k: Any,
    v: Any,
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
    stream: Any = None,
    backend: str | None = None,
    budget_ms: float | None = None,
    chunk_size: int | None = None,
    chunk_threshold: int | None = None,
    max_scratch_bytes: int | None = None,
    num_threads: int | None = None,
    progress: ProgressArgument = None,
) -> Any:
    r"""Exact scaled-dot-product attention over keys of any length.

    .. math::

        score_{ij} &= cap(scale \sum_d q_{id} k_{jd}) + mask_{ij}, \quad
        cap(x) = softcap \tanh(x / softcap) \\
        lse_i &= \log(\sum_j e^{score_{ij}} + e^{sink}) \\
        out_i &= \sum_j e^{score_{ij} - lse_i} v_j

    Parameters
    ----------
    q : array, [batch, num_heads, q_len, head_dim]
        Queries: float32, float16 or bfloat16, of NumPy (bfloat16 by ml_dtypes) or of any library
        with ``__dlpack__`` (PyTorch, MLX, JAX), in host memory, or all arrays on one CUDA device.
        Read in place, with any strides of 0 and more; pass a [batch, len, heads, dim] array
        transposed.
    k : array, [batch, num_kv_heads, kv_len, head_dim]
        Keys, of the dtype of `q`. Query head ``h`` reads key head
        ``h // (num_heads // num_kv_heads)``.
    v : array, [batch, num_kv_heads, kv_len, value_dim]
        Values, of the dtype of `q`.
    scale : float, optional
        Factor on q.k; ``1 / sqrt(head_dim)`` by default.
    mask : array, optional
        Broadcasts to [batch, num_heads, q_len, kv_len]. Boolean: true = visible. float32 or the
        dtype of `q`: added to the scaled score; -inf hides the key.
    causal : bool, optional
        Query row i sees key j only if ``j <= i + q_offset``.
    q_offset : int, optional
        Key position of query row 0. Default ``kv_len - q_len`` (with `kv_lens`, of each entry):
        bottom-right alignment, as in MLX and FlashAttention. PyTorch's alignment is 0.
    window : (int or None, int or None), optional
        Keys seen before and after a row's own position; None has no bound.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``, before the mask.
    sinks : array, [num_heads], optional
        A logit per head that joins the denominator only; float32 or the dtype of `q`.
    kv_lens : sequence of int, [batch], optional
        Keys of each batch entry; those behind are never read. With arrays on a CUDA device also an
        int32 array there, which is read in the order of the stream.
    return_lse : bool, optional
        Return the logsumexp too.
    out : array, [batch, num_heads, q_len, value_dim], optional
        Receives the result; written only on success, except on a CUDA device. Of the dtype of `q`,
        writable.
    stream : int or object, optional
        For arrays on a CUDA device: the stream in whose order the call works, as a number or an
        object of PyTorch, CuPy or cuda-python. Default: the current stream of the library of `q`
        (PyTorch, CuPy), else the device's default stream.
    backend : str, optional
        As :func:`devices` lists it. Default: ``KEYFOLD_BACKEND``, else the first that can; for
        arrays on a CUDA device, that device's.
    budget_ms : float, optional
        Longest device time of one dispatch in milliseconds, 0.1 to 60000. Default:
        ``KEYFOLD_BUDGET_MS``, else 100.
    chunk_size : int, optional
        Keys per dispatch. Default: ``KEYFOLD_CHUNK_SIZE``, else chosen from measured time.
    chunk_threshold : int, optional
        With fewer keys than this one dispatch per row block is made. Default:
        ``KEYFOLD_CHUNK_THRESHOLD``, else 0.
    max_scratch_bytes : int, optional
        Most scratch. Default: ``KEYFOLD_MAX_SCRATCH_MB``, else 256 MiB.
    num_threads : int, optional
        CPU threads; of more than the process may use only those. Default:
        ``KEYFOLD_NUM_THREADS``, else all that it may use.
    progress : bool or callable, optional
        True shows a bar; a callable takes a :class:`Progress` after each dispatch. What it raises
        ends the call.

    Returns
    -------
    out : array, [batch, num_heads, q_len, value_dim]
        Of the library and dtype of `q`; or `out`. A row that sees no key is 0.
    lse : array, [batch, num_heads, q_len]
        With `return_lse`: float32, natural logarithm, sinks included. -inf for a row that sees no
        key (with a sink: the sink).

    Raises
    ------
    InvalidArgument
        A ValueError that names the argument.
    TypeError
        Something is no array, or no number.
    UnsupportedError, OutOfMemoryError, DeviceError
        RuntimeErrors. After any exception, `out` is as it was before.
    KeyboardInterrupt
        On Ctrl-C, at the end of the dispatch that runs: within about one budget.

    Notes
    -----
    Accumulates in float32. The bits of the result depend on q, k, v, the options of the formula
    and the kernel: not on chunks, budget, threads, or what else is in the batch. Scratch does not
    grow with kv_len. Takes ``2 * (head_dim + value_dim)`` flops per visible pair. The GIL is
    released. With arrays on a CUDA device the call returns when all dispatches but the last are
    done; one of a single dispatch waits for nothing, and its time is not in the report. Nothing is
    copied but, for arrays of libraries other than NumPy and PyTorch, the
    result where their ``from_dlpack`` copies.

    References
    ----------
    Online softmax (Milakov and Gimelshein 2018), FlashAttention (Dao et al. 2022), chunked keys
    merged by logsumexp (ml-explore/mlx#3307).

    Examples
    --------
    >>> import numpy as np, keyfold
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((1, 8, 1, 64), np.float32)
    >>> k, v = rng.standard_normal((2, 1, 2, 100_000, 64), np.float32)
    >>> out = keyfold.scaled_dot_product_attention(q, k, v, budget_ms=8)
    >>> out.shape
    (1, 8, 1, 64)
    """
    check_tensors(q=q, k=k, v=v, mask=mask, sinks=sinks)
    number = stream_of(q, stream)
    options = native_options(
        scale=scale,
        mask=mask,
        causal=causal,
        q_offset=q_offset,
        window=window,
        softcap=softcap,
        sinks=sinks,
        kv_lens=kv_lens,
        stream=number,
        backend=backend,
        budget_ms=budget_ms,
        chunk_size=chunk_size,
        chunk_threshold=chunk_threshold,
        max_scratch_bytes=max_scratch_bytes,
        num_threads=num_threads,
    )
    shape, dtype = shape_and_dtype(q, "q", number)
    value_shape, _ = shape_and_dtype(v, "v", number)
    shape = (*shape[:-1], *value_shape[-1:])
    results = Results(q, shape, dtype, out=out, with_lse=return_lse)
    with watched(progress) as callback:
        _keyfold.attention(q, k, v, results.out, results.lse, options, callback)
    return results.deliver()


def merge_state(out_a: Array, lse_a: Any, out_b: Any, lse_b: Any) -> tuple[Array, Array]:
    r"""Merge two finished results over disjoint keys.

    .. math::

        lse &= \log(e^{lse_a} + e^{lse_b}) \\
        out &= e^{lse_a - lse} out_a + e^{lse_b - lse} out_b

    Parameters
    ----------
    out_a, out_b : array, [batch, num_heads, q_len, value_dim]
        Outputs of one dtype: float32, float16 or bfloat16.
    lse_a, lse_b : array, [batch, num_heads, q_len]
        Their logsumexps: float32, natural logarithm. Results with sinks must carry them in one of
        the two only.

    Returns
    -------
    out : array, [batch, num_heads, q_len, value_dim]
        Of the library and dtype of `out_a`. 0 where both logsumexps are -inf.
    lse : array, [batch, num_heads, q_len]
        float32.

    Raises
    ------
    InvalidArgument
        A ValueError that names the argument.
    TypeError
        Something is no array.

    Notes
    -----
    Computes in float32 and rounds once to the dtype; :class:`AttentionState` keeps float32 in
    between. Takes the time of reading and writing each element; allocates the results.

    References
    ----------
    merge_state of FlashInfer (Ye et al. 2024).
    """
    check_tensors(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    shape, dtype = _keyfold.shape_and_dtype(out_a, "out_a")
    results = Results(out_a, shape, dtype, with_lse=True)
    _keyfold.merge_state(out_a, lse_a, out_b, lse_b, results.out, results.lse)
    merged: tuple[Array, Array] = results.deliver()
    return merged


def last_report() -> Report | None:
    """How the last call on this thread that succeeded ran; None before any has."""
    fields = _keyfold.last_report()
    return None if fields is None else Report(*fields)
