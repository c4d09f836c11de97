"""Random inputs, attention in float64, and the rule by which results are judged."""

from __future__ import annotations

from typing import Any

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
) -> tuple[Floats, Floats]:
    """Out and lse of the plain formula, computed in `dtype`; arguments as keyfold's."""
    q, k, v = (as_numpy(x).astype(dtype) for x in (q, k, v))
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    group = heads // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("bhid,bhjd->bhij", q, k) * dtype(head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = dtype(softcap) * np.tanh(scores / dtype(softcap))
    visible = np.ones(scores.shape, bool)
    if mask is not None:
        mask = as_numpy(mask)
        if mask.dtype == bool:
            visible &= mask
        else:
            scores = scores + mask.astype(dtype)
    ends = [kv_len] * batch if kv_lens is None else [int(n) for n in kv_lens]
    keys, rows = np.arange(kv_len), np.arange(q_len)[:, None]
    for b, end in enumerate(ends):
        position = rows + (end - q_len if q_offset is None else q_offset)
        left, right = window or (None, None)
        visible[b] &= keys < end
        if causal:
            visible[b] &= keys <= position
        if left is not None:
            visible[b] &= keys >= position - left
        if right is not None:
            visible[b] &= keys <= position + right
    scores = np.where(visible, scores, -np.inf)
    joined = scores
    if sinks is not None:
        logits = np.broadcast_to(
            as_numpy(sinks).astype(dtype)[None, :, None, None], (batch, heads, q_len, 1)
        )
        joined = np.concatenate([scores, logits], axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        top = joined.max(axis=-1, keepdims=True, initial=-np.inf)
        total = np.exp(joined - np.where(np.isfinite(top), top, 0)).sum(axis=-1, keepdims=True)
        lse = np.where(np.isfinite(top), top, 0) + np.log(total)
        weights = np.exp(scores - np.where(total == 0, 0, lse))
    return np.einsum("bhij,bhjd->bhid", weights, v), lse[..., 0]


def judge(result: Any, expected: Floats, naive: Any, dtype: str) -> None:
    """Check the error: at most twice that of a naive computation, plus the dtype's rounding.

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
    size = np.abs(expected[finite]).max()
    floor = size * (_EPSILON[dtype] + 16 * 2.0**-24)
    error = np.abs(result[finite] - expected[finite]).max()
    naive_error = np.abs(naive[finite] - expected[finite])
    allowed = 2 * np.nan_to_num(naive_error, nan=0.0, posinf=0.0).max() + floor
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
