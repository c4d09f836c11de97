"""Attention with the signature of ``torch.nn.functional.scaled_dot_product_attention``."""

# No `from __future__ import annotations`: torch.library reads the annotations of the operator.
from typing import Optional

import torch
from torch import Tensor

from ._arrays import check_no_gradient
from ._attention import scaled_dot_product_attention as _attend
from ._errors import InvalidArgument

__all__ = ["scaled_dot_product_attention"]


@torch.library.custom_op("keyfold::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Optional[Tensor],
    sinks: Optional[Tensor],
    causal: bool,
    q_offset: Optional[int],
    scale: Optional[float],
    softcap: Optional[float],
) -> Tensor:
    """The operator that graphs contain; arguments as keyfold.scaled_dot_product_attention's."""
    return _attend(
        q,
        k,
        v,
        mask=mask,
        sinks=sinks,
        causal=causal,
        q_offset=q_offset,
        scale=scale,
        softcap=softcap,
    )


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _with_batch(tensor: Tensor, batch: torch.Size, axes: int) -> Tensor:
    """Expand what precedes the last `axes` axes to `batch`, as one axis."""
    if tensor.shape[:-axes] != batch:
        tensor = tensor.expand(*batch, *tensor.shape[-axes:])
    return tensor if len(batch) == 1 else tensor.reshape(-1, *tensor.shape[-axes:])


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""Stand in for ``torch.nn.functional.scaled_dot_product_attention``.

    .. math:: softmax(scale \cdot Q K^T + mask) V

    Parameters
    ----------
    query : Tensor, [..., num_heads, q_len, head_dim]
        float32, float16 or bfloat16, on the CPU.
    key : Tensor, [..., num_kv_heads, kv_len, head_dim]
        Leading axes broadcast.
    value : Tensor, [..., num_kv_heads, kv_len, value_dim]
        Values.
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
        for those that are not on the CPU too.

    Notes
    -----
    Accumulates in float32; see :func:`keyfold.scaled_dot_product_attention` for bits, memory and
    time. It is the operator ``keyfold::attention``, which torch.compile takes without a break.
    """
    check_no_gradient(query=query, key=key, value=value, attn_mask=attn_mask)
    if dropout_p != 0:
        raise InvalidArgument(f"dropout_p: expected 0, as keyfold has no dropout, got {dropout_p}")
    if is_causal and attn_mask is not None:
        raise InvalidArgument("attn_mask: expected None with is_causal, got a mask")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise InvalidArgument(
                f"{name}: expected at least 2 axes [..., len, dim], got the shape "
                f"{list(tensor.shape)}"
            )
    q, k, v = (t.unsqueeze(0) if t.dim() == 2 else t for t in (query, key, value))
    heads, kv_heads = q.shape[-3], k.shape[-3]
    if not enable_gqa and heads != kv_heads:
        if 1 not in (heads, kv_heads):
            raise InvalidArgument(
                f"key: expected {heads} heads as query has, got {kv_heads}; enable_gqa=True groups "
                "them"
            )
        q = q.expand(*q.shape[:-3], max(heads, kv_heads), *q.shape[-2:])
    batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    mask = attn_mask
    if mask is not None and len(batch) > 1:
        mask = mask.expand(*batch, *([1] * max(0, 3 - mask.dim())), *mask.shape[-3:])
        mask = _with_batch(mask, batch, 3)
    out = attention(
        _with_batch(q, batch, 3),
        _with_batch(k, batch, 3),
        _with_batch(v, batch, 3),
        mask,
        None,
        is_causal,
        0 if is_causal else None,
        scale,
        None,
    )
    out = out.reshape(*batch, *out.shape[1:])
    return out if max(query.dim(), key.dim(), value.dim()) > 2 else out.squeeze(0)
