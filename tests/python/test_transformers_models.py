"""keyfold.transformers on small random models of many kinds, against their own attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from test_transformers import Calls, build, judge, tokens, torch, transformers


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products as small as these only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


DECODER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 99,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # scores of some units: softcap, sinks and scale then matter
    "pad_token_id": 0,
    "eos_token_id": None,
}
WINDOW = {"sliding_window": 8}
# What each is here for; the models with a softcap or sinks have no "sdpa" of their own.
DECODERS = {
    "Llama": {},  # grouped heads
    "Mistral": WINDOW,
    "Gemma2": WINDOW | {"attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 9},  # and scale
    "Gemma3": WINDOW,  # sliding and full layers in turn
    "GptOss": WINDOW | {"num_local_experts": 2, "num_experts_per_tok": 1},  # sinks
    "DeepseekV3": {  # value_dim is not head_dim
        "num_key_value_heads": 4,
        "head_dim": 8,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 20,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
    },
    "Gemma4": WINDOW  # late layers see the last queries only
    | {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 16,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 99,
    },
}


def decoder(name: str, implementation: str, dtype: Any = torch.float32) -> Any:
    text = "Text" if name in ("Gemma3", "Gemma4") else ""
    config = getattr(transformers, f"{name}{text}Config")(**DECODER | DECODERS[name])
    config._experts_implementation = "eager"  # the only one that takes float64
    return build(getattr(transformers, f"{name}ForCausalLM"), config, implementation, dtype)


def padded_on_the_left() -> dict[str, Any]:
    ids, mask = tokens(3, 24, vocab_size=99), torch.ones(3, 24, dtype=torch.long)
    ids[0, :15], mask[0, :15] = 0, 0
    ids[1, :1], mask[1, :1] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def check(make: Any, layers: int, visible: Any = ..., **inputs: Any) -> None:
    """Judge the first output of the model that `make` builds, where `visible`."""

    def run(implementation: str, dtype: Any = torch.float32) -> Any:
        model = make(implementation, dtype)
        with Calls() as calls:
            result = model(**inputs)[0][visible]
        assert calls.count == (layers if implementation == "keyfold" else 0)
        return result

    exact = run("eager", torch.float64)
    judge(run("keyfold"), exact, run("eager"))


@pytest.mark.parametrize("name", DECODERS)
def test_logits(name: str) -> None:
    layers = 4 if name == "Gemma4" else 2
    check(lambda *how: decoder(name, *how), layers, input_ids=tokens(3, 24, vocab_size=99))


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_padding_changes_nothing(name: str) -> None:
    inputs = padded_on_the_left()
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = decoder(name, "keyfold")(position_ids=positions, **inputs).logits
    for ids, mask, ours in zip(*inputs.values(), logits, strict=True):
        visible = mask.bool()
        exact, naive = (
            decoder(name, "eager", dtype)(ids[None, visible]).logits[0]
            for dtype in (torch.float64, torch.float32)
        )
        judge(ours[visible], exact, naive)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 10},
        {"use_cache": False},
    ],
    ids=["dynamic", "static", "chunked", "no-cache"],
)
@pytest.mark.parametrize("padded", [False, True])
def test_generate_chooses_the_same_tokens(name: str, options: dict[str, Any], padded: bool) -> None:
    inputs = padded_on_the_left()
    if not padded:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])

    def generate(implementation: str) -> Any:
        model = decoder(name, implementation)
        return model.generate(
            **inputs,
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )

    with Calls() as calls:
        ours = generate("keyfold")
    assert calls.count >= 24
    theirs = generate("eager")
    assert ours.sequences.shape == (3, 36)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits))
    assert torch.equal(ours.sequences, theirs.sequences)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("keep", [1, 5])
def test_late_layers_that_see_the_last_queries_only(static: bool, keep: int) -> None:
    def logits(implementation: str) -> Any:
        model = decoder("Gemma4", implementation)
        cache = None
        if static:
            cache = transformers.StaticCache(config=model.config, max_cache_len=60)
        ids = tokens(1, 24, vocab_size=99)
        return model(ids, past_key_values=cache, logits_to_keep=keep).logits

    torch.testing.assert_close(logits("keyfold"), logits("eager"))


def test_encoder() -> None:
    config = transformers.BertConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=99,
        initializer_range=0.2,
    )
    inputs = padded_on_the_left()
    visible = inputs["attention_mask"].bool()
    check(lambda *how: build(transformers.BertModel, config, *how), 2, visible, **inputs)
    del inputs["attention_mask"]
    check(lambda *how: build(transformers.BertModel, config, *how), 2, **inputs)


@pytest.mark.parametrize("padded", [False, True])
def test_position_bias_and_cross_attention(padded: bool) -> None:
    config = transformers.T5Config(
        d_model=64,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        vocab_size=99,
        initializer_factor=3.0,
    )
    inputs = padded_on_the_left()
    if not padded:
        del inputs["attention_mask"]
    inputs["decoder_input_ids"] = tokens(3, 9, vocab_size=99)
    check(lambda *how: build(transformers.T5ForConditionalGeneration, config, *how), 6, **inputs)
