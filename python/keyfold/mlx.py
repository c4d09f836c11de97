"""Attention with the signature of ``mx.fast.scaled_dot_product_attention``."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import mlx.core as mx

from ._attention import scaled_dot_product_attention as _attend
from ._errors import InvalidArgument

__all__ = ["scaled_dot_product_attention"]

_DTYPES = (mx.float32, mx.float16, mx.bfloat16)


# A custom function, since MLX takes the values that come back as constants: without the two rules
# below mx.grad would return zeros, silently.
@mx.custom_function
def _attention(q: Any, k: Any, v: Any, mask: Any, sinks: Any, causal: bool, scale: float) -> Any:
    return _attend(q, k, v, mask=mask, sinks=sinks, causal=causal, scale=scale)


def _no_gradient(*_: object) -> NoReturn:
    raise InvalidArgument(
        "q, k, v, mask, sinks: expected arrays that need no gradient, as keyfold has no backward "
        "pass yet; wrap the result in mx.stop_gradient, or use "
        "mx.fast.scaled_dot_product_attention here"
    )


_attention.vjp(_no_gradient)
_attention.jvp(_no_gradient)


def _check_array(name: str, array: Any, expected: str = "an mlx.core.array") -> None:
    if not isinstance(array, mx.array):
        raise TypeError(f"{name}: expected {expected}, got {array!r:.200}")


def _check_stream(stream: Any) -> None:
    device = getattr(stream, "device", stream)
    if stream is not None and getattr(device, "type", device) != mx.cpu:
        raise InvalidArgument(
            "stream: expected None or the CPU, as keyfold does not run on MLX's streams, "
            f"got {stream!r}"
        )


def _evaluate(name: str, array: mx.array) -> mx.array:
    """Give `array` its value, in memory that keyfold reads: one that is reversed is copied."""
    try:
        mx.eval(array)
    except ValueError as error:
        if "transformations" not in str(error):
            raise
        raise InvalidArgument(
            f"{name}: expected an array that has a value, as keyfold computes at once, got one "
            "that mx.compile or mx.vmap traces; call keyfold outside of them, or use "
            "mx.fast.scaled_dot_product_attention here"
        ) from error
    if min(memoryview(cast("Any", array)).strides or (0,)) < 0:
        # Not mx.contiguous, which leaves the stride of an axis of one element as it is.
        array = mx.take(array, mx.arange(array.shape[0]), axis=0, stream=mx.cpu)
        mx.eval(array)
    return array


def scaled_dot_product_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    force_fused: bool = False,
    stream: mx.Stream | mx.Device | mx.DeviceType | None = None,
) -> mx.array:
    r"""Stand in for ``mx.fast.scaled_dot_product_attention``.

    .. math:: out = softmax(scale \cdot Q K^T + mask) V

    Parameters
    ----------
    q : array, [batch, num_heads, q_len, head_dim]
        Queries. `q`, `k` and `v` are promoted to a common dtype, which must be float32, float16 or
        bfloat16.
    k : array, [batch, num_kv_heads, kv_len, head_dim]
        Keys. Query head ``h`` reads key head ``h // (num_heads // num_kv_heads)``.
    v : array, [batch, num_kv_heads, kv_len, value_dim]
        Values.
    scale : float
        Factor on q.k; finite.
    mask : "causal" or array, optional
        ``"causal"``: query i sees key j only if ``j <= i + kv_len - q_len`` (bottom-right aligned,
        as in MLX). An array has at most 4 axes and broadcasts to
        [batch, num_heads, q_len, kv_len]. Boolean: true = visible. Any other dtype that promotes to
        the common one, integers too: added to the scaled score.
    sinks : array, [num_heads], optional
        A logit per head that joins the denominator only; of a dtype that promotes to the common
        one.
    force_fused : bool, optional
        Changes nothing: all of keyfold's paths are fused, and none holds the scores in memory.
    stream : Stream or Device, optional
        Where inputs of other dtypes are converted: the CPU. The attention runs on keyfold's
        backend (``KEYFOLD_BACKEND``).

    Returns
    -------
    array, [batch, num_heads, q_len, value_dim]
        Of the common dtype, with its values: nothing is left to evaluate. A row that sees no key
        is 0. (MLX gives the mean of the values for those that a boolean or causal mask hides, and
        NaN where an additive mask is -inf throughout.)

    Raises
    ------
    InvalidArgument
        A ValueError that names the argument or environment variable. Also for a size of 0 other
        than kv_len, and inside mx.compile, mx.vmap and, once a gradient is asked for, mx.grad.
    TypeError
        Something is no mlx.core.array, or no number.

    Notes
    -----
    Evaluates its inputs and reads them in place; only those of another dtype, or reversed by a
    negative step, are copied first. The result is copied into MLX's memory. Accumulates in
    float32; see :func:`keyfold.scaled_dot_product_attention` for bits, memory and time.

    ``MLX_SDPA_CHUNK_SIZE`` (keys per dispatch) and ``MLX_SDPA_CHUNK_THRESHOLD`` (with fewer keys
    one dispatch per row block is made) are read at each call; ``KEYFOLD_CHUNK_SIZE`` and
    ``KEYFOLD_CHUNK_THRESHOLD`` win over them.

    References
    ----------
    Chunked attention for MLX (ml-explore/mlx#3307), where the two variables come from.

    Examples
    --------
    >>> import mlx.core as mx, keyfold.mlx
    >>> q = mx.random.normal((1, 8, 1, 64))
    >>> k = v = mx.random.normal((1, 2, 100_000, 64))
    >>> keyfold.mlx.scaled_dot_product_attention(q, k, v, scale=64**-0.5, mask="causal").shape
    (1, 8, 1, 64)
    """
    inputs = {"q": q, "k": k, "v": v}
    for name, array in inputs.items():
        _check_array(name, array)
    if scale is None:
        raise TypeError("scale: expected a number, got None")
    _check_stream(stream)
    if isinstance(mask, str):
        if mask != "causal":
            raise InvalidArgument(f'mask: expected "causal" or an array, got {mask!r:.200}')
    elif mask is not None:
        _check_array("mask", mask, 'None, "causal" or an mlx.core.array')
        inputs["mask"] = mask
    if sinks is not None:
        _check_array("sinks", sinks)
        inputs["sinks"] = sinks

    dtype = mx.result_type(q, k, v)
    if dtype not in _DTYPES:
        raise InvalidArgument(
            "q, k, v: expected dtypes that promote to float32, float16 or bfloat16, got "
            f"{q.dtype}, {k.dtype} and {v.dtype}"
        )
    for name, array in inputs.items():
        if mx.result_type(array, dtype) != dtype:
            raise InvalidArgument(
                f"{name}: expected a dtype that promotes to that of q, k and v, {dtype}, got "
                f"{array.dtype}"
            )
        if name != "mask" or array.dtype != mx.bool_:
            array = array.astype(dtype, stream=stream)
        inputs[name] = _evaluate(name, array)
    arrays = [inputs.get(name) for name in ("q", "k", "v", "mask", "sinks")]
    out = cast("mx.array", _attention(*arrays, isinstance(mask, str), scale))
    mx.eval(out)  # what is not evaluated would keep k and v alive
    return out
