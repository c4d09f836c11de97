"""Random inputs, attention in float64, and the rule by which results are judged."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_EPSILON = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def make_inputs(
    rng: np.random.Generator,
    q_len: int = 5,
    kv_len: int = 700,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    value_dim: int | None = None,
    batch: int = 2,
    dtype: str = "float32",
) -> tuple[Any, Any, Any]:
    """Normally distributed q, k and v."""
    sizes = (
        (batch, heads, q_len, head_dim),
        (batch, kv_heads, kv_len, head_dim),
        (batch, kv_heads, kv_len, value_dim or head_dim),
    )
    q, k, v = (rng.standard_normal(size, np.float32).astype(DTYPES[dtype]) for size in sizes)
    return q, k, v


def as_numpy(array: Any) -> npt.NDArray[Any]:
    """Any library's array as float64 (or bool), exactly."""
    if type(array).__module__.startswith("torch"):
        array = array.detach()
        array = array if array.dtype.is_floating_point is False else array.double()
    elif type(array).__module__.startswith("mlx"):
        import mlx.core as mx

        array = array if array.dtype == mx.bool_ else array.astype(mx.float32)
    array = np.asarray(array)
    return array if array.dtype == bool else array.astype(np.float64)


class Result(NamedTuple):
    """Attention of some inputs, and how far float32 may be from it."""

    out: Floats  # [batch, num_heads, q_len, value_dim]
    lse: Floats  # [batch, num_heads, q_len]
    # The typical error of scores and weights in float32, which a good float32 computation has too,
    # even where a naive one is lucky.
    out_noise: float
    lse_noise: float


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float | None = None,
    mask: Any = None,
    causal: bool = False,
    q_offset: int | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    kv_lens: Any = None,
    dtype: type = np.float64,
) -> Result:
    """Compute the plain formula in `dtype`; arguments as keyfold's."""
    q, k, v = (as_numpy(x).astype(dtype) for x in (q, k, v))
    batch, heads, q_len, head_dim = q.shape
    group = heads // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scale = head_dim**-0.5 if scale is None else float(scale)
    scores = np.einsum("bhid,bhjd->bhij", q, k) * dtype(scale)
    if softcap is not None:
        scores = dtype(softcap) * np.tanh(scores / dtype(softcap))
    if mask is not None and as_numpy(mask).dtype != bool:
        scores = scores + as_numpy(mask).astype(dtype)
    visible = _visible(scores.shape, causal, q_offset, window, kv_lens)
    if mask is not None and as_numpy(mask).dtype == bool:
        visible &= as_numpy(mask)
    scores = np.where(visible, scores, -np.inf)
    joined = scores
    if sinks is not None:
        logits = as_numpy(sinks).astype(dtype)[None, :, None, None]
        joined = np.concatenate(
            [scores, np.broadcast_to(logits, (batch, heads, q_len, 1))], axis=-1
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        top = joined.max(axis=-1, keepdims=True, initial=-np.inf)
        top = np.where(np.isfinite(top), top, 0)
        total = np.exp(joined - top).sum(axis=-1, keepdims=True)
        lse = top + np.log(total)
        weights = np.exp(scores - np.where(total == 0, 0, lse))
        # A sum of head_dim terms as a random walk, then scale, cap, mask, exp and the division.
        walk = np.sqrt(head_dim * np.einsum("bhid,bhjd->bhij", q**2, k**2)) * abs(scale)
        noise = 2.0**-24 * (walk + 4 * (np.abs(scores) + 2))
        noise = np.where(weights > 0, weights * noise, 0) ** 2
    return Result(
        np.einsum("bhij,bhjd->bhid", weights, v),
        lse[..., 0],
        float(np.sqrt(np.einsum("bhij,bhjd->bhid", noise, v**2)).max(initial=0)),
        float(np.sqrt(noise.sum(axis=-1)).max(initial=0)),
    )


def _visible(
    shape: tuple[int, ...],
    causal: bool,
    q_offset: int | None,
    window: tuple[int | None, int | None] | None,
    kv_lens: Any,
) -> npt.NDArray[np.bool_]:
    """Which keys the rows see, before the mask."""
    batch, _, q_len, kv_len = shape
    visible = np.ones(shape, bool)
    left, right = window or (None, None)
    keys, rows = np.arange(kv_len), np.arange(q_len)[:, None]
    for b, end in enumerate([kv_len] * batch if kv_lens is None else kv_lens):
        position = rows + (int(end) - q_len if q_offset is None else q_offset)
        visible[b] &= keys < end
        if causal:
            visible[b] &= keys <= position
        if left is not None:
            visible[b] &= keys >= position - left
        if right is not None:
            visible[b] &= keys <= position + right
    return visible


def judge(result: Any, expected: Floats, naive: Any, dtype: str, noise: float = 0.0) -> None:
    """Check the error: at most twice that of a naive computation, the dtype's rounding and `noise`.

    NaN and Inf must stand where the reference has them.
    """
    result, naive = as_numpy(result), as_numpy(naive)
    assert result.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isnan(result), np.isnan(expected))
    np.testing.assert_array_equal(result[np.isinf(expected)], expected[np.isinf(expected)])
    assert np.isfinite(result[finite]).all()
    if not finite.any():
        return
    rounding = np.abs(expected[finite]).max() * _EPSILON[dtype]
    error = np.abs(result[finite] - expected[finite]).max()
    naive_error = np.nan_to_num(np.abs(naive[finite] - expected[finite]), nan=0.0, posinf=0.0)
    # Of n errors of one typical size the largest is about sqrt(2 ln n) times as large.
    largest = max(1.0, (2 * np.log(finite.sum())) ** 0.5)
    allowed = 2 * naive_error.max() + rounding + noise * largest
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
