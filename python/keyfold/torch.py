"""Attention with the signature of ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from . import _keyfold
from ._arrays import check_no_gradient
from ._devices import stream_of
from ._errors import InvalidArgument
from ._options import native_options

__all__ = ["scaled_dot_product_attention"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The operator that graphs contain; arguments as keyfold.scaled_dot_product_attention's. By schema,
# as torch.library.custom_op takes more time of each call.
torch.library.define(
    "keyfold::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? sinks=None, bool causal=False, "
    "SymInt? q_offset=None, float? scale=None, float? softcap=None) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("keyfold::attention")
def _new_result(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    """Memory for the result, with the axes in the order of those of `q`, as PyTorch has it."""
    if q.size(-1) == v.size(-1):
        return torch.empty_like(q)
    return torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)


@lru_cache(maxsize=64)
def _plain_options(
    causal: bool, q_offset: int | None, scale: float | None, softcap: float | None
) -> _keyfold.Options:
    """Options without arrays, kept: a short call would take a tenth of its time to make them."""
    return native_options(causal=causal, q_offset=q_offset, scale=scale, softcap=softcap)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = False,
    q_offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    out: Tensor = _new_result(q, k, v)
    if q.is_cpu and mask is None and sinks is None:
        options = _plain_options(causal, q_offset, scale, softcap)
    else:
        options = native_options(
            stream=stream_of(q),
            mask=mask,
            sinks=sinks,
            causal=causal,
            q_offset=q_offset,
            scale=scale,
            softcap=softcap,
        )
    if out.numel() > 0:  # PyTorch takes empty batches, keyfold does not
        _keyfold.attention(q, k, v, out, None, options, None)
    return out


torch.library.impl("keyfold::attention", "CompositeExplicitAutograd", _attention)
_operator = torch.ops.keyfold.attention.default


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""Stand in for ``torch.nn.functional.scaled_dot_product_attention``.

    .. math:: softmax(scale \cdot Q K^T + mask) V

    Parameters
    ----------
    query : Tensor, [..., num_heads, q_len, head_dim]
        float32, float16 or bfloat16, on the CPU, or all tensors on one CUDA device; read in place,
        whatever its strides. Two axes are [q_len, head_dim].
    key : Tensor, [..., num_kv_heads, kv_len, head_dim]
        Of the dtype of `query`. Leading axes broadcast; where several of them do so in part, the
        tensor is copied.
    value : Tensor, [..., num_kv_heads, kv_len, value_dim]
        Of the dtype of `query`; leading axes as those of `key`.
    attn_mask : Tensor, optional
        Broadcasts to [..., num_heads, q_len, kv_len]. Boolean: true = visible. float32 or the
        dtype of `query`: added to the scaled score.
    dropout_p : float, optional
        Only 0 for now.
    is_causal : bool, optional
        Query i sees key j only if j <= i: top-left aligned, as PyTorch does it. (keyfold's own
        ``causal`` is bottom-right.)
    scale : float, optional
        ``1 / sqrt(head_dim)`` by default.
    enable_gqa : bool, optional
        num_heads may be a multiple of num_kv_heads.

    Returns
    -------
    Tensor, [..., num_heads, q_len, value_dim]
        Of the dtype of `query`. A row that sees no key is 0.

    Raises
    ------
    InvalidArgument
        A ValueError that names the argument; for dropout, for tensors that require a gradient, and
        for those that are not on one device too.
    TypeError
        Something is no tensor.

    Notes
    -----
    Accumulates in float32; see :func:`keyfold.scaled_dot_product_attention` for bits, memory and
    time. On a CUDA device it works on PyTorch's current stream. Casts under ``torch.autocast`` as
    PyTorch does. It is the operator ``keyfold::attention``, which torch.compile takes without a
    break; an error that torch.compile meets while it traces with ``fullgraph=True`` comes as its
    own, with the message inside.
    """
    named = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
    check_no_gradient(**named)
    _check_tensors(named)
    if dropout_p != 0:
        raise InvalidArgument(f"dropout_p: expected 0, as keyfold has no dropout, got {dropout_p}")
    if is_causal and attn_mask is not None:
        raise InvalidArgument("attn_mask: expected None with is_causal, got a mask")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) if t.dtype in _DTYPES else t for t in (query, key, value))
        if attn_mask is not None and attn_mask.dtype in _DTYPES:
            attn_mask = attn_mask.to(dtype)
    _check_dtypes(query, key, value, attn_mask)
    axes = max(query.dim(), key.dim(), value.dim())
    q, k, v = (t if t.dim() >= 4 else t[(None,) * (4 - t.dim())] for t in (query, key, value))
    batch, heads = _batch_and_heads(q, k, v, enable_gqa)
    if k.size(-3) != v.size(-3):
        k, v = _with_heads(k, heads), _with_heads(v, heads)
    out: Tensor = _operator(
        _with_batch(_with_heads(q, heads), batch),
        _with_batch(k, batch),
        _with_batch(v, batch),
        None
        if attn_mask is None
        else _fitted(attn_mask, (*batch, heads, q.shape[-2], k.shape[-2])),
        None,
        is_causal,
        0 if is_causal else None,
        scale,
    )
    return out if axes == 4 else out.reshape((*batch, *out.shape[1:])[-axes:])


def _check_tensors(named: dict[str, Tensor | None]) -> None:
    home: torch.device | None = None
    for name, tensor in named.items():
        if tensor is None and name == "attn_mask":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        device = tensor.device
        if device != home:  # of query, the first
            if not (tensor.is_cpu or tensor.is_cuda):
                raise InvalidArgument(
                    f"{name}: expected a tensor on the CPU or a CUDA device, got one on "
                    f"{device}; move it there with .cpu() or .cuda()"
                )
            if home is not None:
                raise InvalidArgument(
                    f"{name}: expected a tensor on {home}, where query is, got one on {device}"
                )
            home = device
        if name != "attn_mask" and tensor.dim() < 2:
            raise InvalidArgument(
                f"{name}: expected at least 2 axes [..., len, dim], got the shape "
                f"{list(tensor.shape)}"
            )


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    if query.dtype not in _DTYPES:
        raise InvalidArgument(
            f"query: expected the dtype float32, float16 or bfloat16, got {query.dtype}"
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise InvalidArgument(
                f"{name}: expected {query.dtype} as query has, got {tensor.dtype}"
            )
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise InvalidArgument(
            f"attn_mask: expected torch.bool, torch.float32 or {query.dtype}, got {mask.dtype}"
        )


def _batch_and_heads(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> tuple[torch.Size, int]:
    """Check how the shapes fit together; give the batch axes and the number of query heads."""
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape  # each is made when it is asked for
    if q_shape[-1] < 1:
        raise InvalidArgument(f"query: expected a head_dim of at least 1, got {list(q_shape)}")
    if k_shape[-1] != q_shape[-1]:
        raise InvalidArgument(
            f"key: expected the head_dim {q_shape[-1]} as query has, got {k_shape[-1]}"
        )
    if v_shape[-2] != k_shape[-2]:
        raise InvalidArgument(
            f"value: expected the length {k_shape[-2]} as key has, got {v_shape[-2]}"
        )
    heads = q_shape[-3]
    for name, other in (("key", k_shape), ("value", v_shape)):
        count = other[-3]
        if grouped:
            if count == 0 or heads % count:
                raise InvalidArgument(
                    f"{name}: expected a number of heads that divides the {heads} of query, got "
                    f"{count}"
                )
        elif count != heads and heads == 1:
            heads = count
        elif count not in (1, heads):
            raise InvalidArgument(
                f"{name}: expected {heads} heads, or 1, got {count}; enable_gqa=True lets several "
                "query heads share one"
            )
    batch = q_shape[:-3]
    if not batch == k_shape[:-3] == v_shape[:-3]:
        try:
            batch = torch.broadcast_shapes(batch, k_shape[:-3], v_shape[:-3])
        except RuntimeError:
            raise InvalidArgument(
                "query, key, value: expected leading axes that broadcast, got the shapes "
                f"{list(q_shape)}, {list(k_shape)}, {list(v_shape)}"
            ) from None
    return batch, heads


def _with_heads(tensor: Tensor, heads: int) -> Tensor:
    """Repeat each head, without a copy where there is one."""
    count = tensor.size(-3)
    if count == heads:
        return tensor
    groups = tensor.unsqueeze(-3).expand(*tensor.shape[:-2], heads // count, *tensor.shape[-2:])
    return groups.flatten(-4, -3)


def _with_batch(tensor: Tensor, batch: torch.Size) -> Tensor:
    """Expand what precedes the last three axes to `batch`, as one axis."""
    shape = tensor.shape
    if shape[:-3] != batch:
        tensor = tensor.expand(*batch, *shape[-3:])
    return tensor if len(batch) == 1 else tensor.flatten(0, -4)


def _fitted(mask: Tensor, scores: tuple[int, ...]) -> Tensor:
    """Give the mask the batch axis of the operator's tensors; its other axes still broadcast."""
    try:
        full = mask.expand(scores)
    except RuntimeError:
        raise InvalidArgument(
            f"attn_mask: expected a shape that broadcasts to {list(scores)}, got {list(mask.shape)}"
        ) from None
    if len(scores) == 4:
        return full
    return _with_batch(mask[(None,) * (3 - mask.dim())], torch.Size(scores[:-3]))
