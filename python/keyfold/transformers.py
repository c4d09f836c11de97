"""Attention of Hugging Face Transformers' models: ``attn_implementation="keyfold"``."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from . import torch as _operator  # noqa: F401 - defines torch.ops.keyfold.attention
from ._arrays import check_no_gradient
from ._errors import InvalidArgument, UnsupportedError

__all__ = ["register"]

# Arguments by which a few models change the formula in ways that no mask tells.
_UNSUPPORTED = {
    "cache": "paged cache (continuous batching)",
    "head_mask": "factor per head on the weights",
    "indices": "choice of keys by index",
    "block_indices": "choice of keys by block",
    "sinks": "sink per query",
}


def register() -> None:
    r"""Make ``attn_implementation="keyfold"`` known to Transformers, in this process.

    .. math:: softmax(cap(scaling \cdot Q K^T) + mask + position\_bias) V

    Every model whose attention goes through Transformers' attention interface can then be loaded
    with ``from_pretrained(..., attn_implementation="keyfold")``, or switched by
    ``model.set_attn_implementation("keyfold")``. A second call changes nothing.

    Raises
    ------
    ImportError
        On ``import keyfold.transformers``, where Transformers or PyTorch is missing.

    Notes
    -----
    Needs Transformers 5 (tested with 5.23); models in float32, float16 or bfloat16, on the CPU
    or a CUDA device.

    Grouped heads, softcap (Gemma 2), sinks (gpt-oss), position biases (T5), padding, sliding
    windows and all caches but the paged one are supported. A row that sees no key is 0. A prompt
    without padding makes no mask, whatever its length. Padding, a sliding window shorter than the
    keys, and prompts that go in piece by piece make one of a byte per query and key, as with
    ``"sdpa"``; a position bias is as large as the model makes it. See
    :func:`keyfold.scaled_dot_product_attention` for bits, memory and time; the environment
    (``KEYFOLD_BUDGET_MS``, ...) sets its options.

    While the model runs, :class:`keyfold.InvalidArgument` is raised for tensors that require a
    gradient (use ``torch.no_grad()``; ``model.generate`` does), for dropout (use
    ``model.eval()``), and for ``output_attentions``. :class:`keyfold.UnsupportedError` is raised
    for what keyfold has no formula for (sparse attention by indices, packed sequences without a
    mask), and for models that build Transformers' masks but compute attention by themselves.
    Models that do neither ignore ``attn_implementation``, or raise a KeyError.

    It is the operator ``keyfold::attention``, which torch.compile takes without a break.

    Examples
    --------
    >>> import keyfold.transformers
    >>> keyfold.transformers.register()
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    ...                      num_attention_heads=4, vocab_size=99, attn_implementation="keyfold")
    >>> LlamaForCausalLM(config).generate(max_new_tokens=7, min_new_tokens=7).shape
    torch.Size([1, 8])
    """
    AttentionInterface.register("keyfold", _attention)
    AttentionMaskInterface.register("keyfold", _mask)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute one layer: [batch, heads, len, dim] in, [batch, len, heads, dim] out."""
    check_no_gradient(
        query=query,
        key=key,
        value=value,
        attention_mask=attention_mask,
        s_aux=s_aux,
        position_bias=position_bias,
    )
    _check_formula(module, attention_mask, dropout, kwargs)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) for t in (query, key, value))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # Without a mask, a single query is the last key's and sees them all; several begin at key 0.
    causal = query.shape[2] > 1 and attention_mask is None and is_causal
    begins_at_key_0 = causal and not _drops_queries(getattr(module, "config", None))
    out = torch.ops.keyfold.attention(
        query.expand(key.shape[0], -1, -1, -1),  # learned queries have a batch of 1
        key,
        value,
        _with_bias(attention_mask, position_bias),
        s_aux,
        causal,
        0 if begins_at_key_0 else None,
        scaling,
        softcap,
    )
    return out.transpose(1, 2).contiguous(), None


def _check_formula(
    module: torch.nn.Module, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    if dropout != 0:
        raise InvalidArgument(
            f"dropout: expected 0, as keyfold has no dropout, got {dropout}; call model.eval()"
        )
    if kwargs.get("output_attentions"):
        raise InvalidArgument(
            "output_attentions: expected False, as keyfold never holds the attention weights, got "
            'True; use attn_implementation="eager" for them'
        )
    for name, meaning in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise UnsupportedError(
                f"{name}: keyfold has no {meaning}, as {type(module).__name__} wants it; use "
                'attn_implementation="eager"'
            )
    ends = kwargs.get("cu_seq_lens_q")
    if mask is None and ends is not None and ends.shape[0] > 2:
        raise UnsupportedError(
            "cu_seq_lens_q: keyfold needs a mask to keep packed sequences apart; pass position_ids "
            "that begin anew with each, and use_cache=False"
        )


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """One mask that stands for both."""
    if mask is None or bias is None:
        return mask if bias is None else bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Make the mask as for "sdpa": boolean, and None where the causal flag says it all."""
    config = kwargs.get("config")
    _check_model(config)
    if _drops_queries(config) and kwargs["kv_length"] > kwargs["q_length"]:
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


def _drops_queries(config: Any) -> bool:
    """Tell whether late layers may get only the last of the queries that a mask was made for.

    Gemma 4 does that. There, no mask means that the last query is the last key's; a prompt in a
    static cache, longer than the prompt, therefore needs its mask.
    """
    return getattr(config, "model_type", "").startswith("gemma4")


def _check_model(config: Any) -> None:
    """Refuse models that compute attention by themselves: they would add the boolean mask."""
    modeling = type(config).__module__.replace(".configuration_", ".modeling_")
    if not _uses_interface(modeling):
        raise UnsupportedError(
            f"attn_implementation: {config.model_type} computes attention by itself, so that "
            'keyfold cannot stand in for it; use "eager"'
        )


@torch.compiler.assume_constant_result  # else each name of the module becomes a guard
def _uses_interface(modeling: str) -> bool:
    names = vars(sys.modules[modeling]) if modeling in sys.modules else {}
    return "ALL_ATTENTION_FUNCTIONS" in names or not any(
        isinstance(value, type)
        and issubclass(value, torch.nn.Module)
        and value.__module__ == modeling
        and "Attention" in name
        for name, value in names.items()
    )
