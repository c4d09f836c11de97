"""keyfold.torch against torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

import inspect
import itertools
import random
from typing import Any

import pytest
import reference

torch = pytest.importorskip("torch")

import keyfold  # noqa: E402
import keyfold.torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

original = torch.nn.functional.scaled_dot_product_attention
attend = keyfold.torch.scaled_dot_product_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)


def expected(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> reference.Result:
    """The reference in float64, all leading axes taken as heads."""
    q, k, v = (t.double() for t in (query, key, value))
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    lead = torch.broadcast_shapes(*(t.shape[:-2] for t in (q, k, v)))

    def folded(tensor: torch.Tensor, *last: int) -> torch.Tensor:
        return tensor.expand(*lead, *last).reshape(1, lead.numel(), *last)

    mask = attn_mask
    if mask is not None:
        mask = folded(mask, q.shape[-2], k.shape[-2])
    q, k, v = (folded(t, *t.shape[-2:]) for t in (q, k, v))
    exact = reference.attention(q, k, v, mask=mask, causal=is_causal, q_offset=0, scale=scale)
    return exact._replace(out=exact.out.reshape(*lead, *exact.out.shape[-2:]))


def judge(result: torch.Tensor, exact: reference.Result, naive: torch.Tensor, dtype: str) -> None:
    reference.judge(result, exact.out, naive, dtype, exact.out_noise)


def check(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    """Judge one call; the error of the original in the same dtype is the measure."""
    result, naive = attend(*tensors, **options), original(*tensors, **options)
    assert result.dtype == naive.dtype
    assert result.stride() == naive.stride() or result.numel() == 0
    judge(result, expected(*tensors, **options), naive, name_of(result.dtype))
    return result


# Of query, key and value.
SHAPES = {
    "2-D": ([5, 16], [7, 16], [7, 16]),
    "2-D and 3-D": ([5, 16], [3, 7, 16], [7, 16]),
    "3-D": ([3, 5, 32], [3, 9, 32], [3, 9, 24]),
    "3-D, one key head": ([3, 5, 32], [1, 9, 32], [1, 9, 32]),
    "4-D": ([2, 4, 5, 64], [2, 4, 9, 64], [2, 4, 9, 64]),
    "more rows than keys": ([2, 3, 11, 33], [2, 3, 6, 33], [2, 3, 6, 33]),
    "one row": ([2, 4, 1, 128], [2, 4, 37, 128], [2, 4, 37, 128]),
    "one key": ([2, 4, 3, 7], [2, 4, 1, 7], [2, 4, 1, 7]),
    "no key": ([2, 4, 3, 8], [2, 4, 0, 8], [2, 4, 0, 8]),
    "head_dim 256": ([1, 2, 4, 256], [1, 2, 35, 256], [1, 2, 35, 256]),
    "narrow values": ([1, 2, 3, 192], [1, 2, 17, 192], [1, 2, 17, 128]),
    "wide values": ([1, 2, 3, 1], [1, 2, 17, 1], [1, 2, 17, 65]),
    "one key head": ([2, 4, 3, 64], [2, 1, 9, 64], [2, 1, 9, 64]),
    "one query head": ([2, 1, 3, 64], [2, 4, 9, 64], [2, 4, 9, 64]),
    "one value head": ([2, 4, 3, 64], [2, 4, 9, 64], [2, 1, 9, 64]),
    "one batch of keys": ([3, 2, 3, 64], [1, 2, 9, 64], [3, 2, 9, 64]),
    "one batch of queries": ([1, 2, 3, 64], [3, 2, 9, 64], [3, 2, 9, 64]),
    "4-D and 3-D": ([3, 2, 4, 16], [2, 6, 16], [2, 6, 16]),
    "5-D": ([2, 3, 2, 4, 16], [2, 3, 2, 6, 16], [2, 3, 2, 6, 16]),
    "5-D, broadcast": ([2, 1, 2, 4, 16], [3, 2, 6, 16], [2, 1, 1, 6, 16]),
    "6-D": ([2, 1, 2, 2, 3, 16], [1, 2, 2, 2, 5, 16], [2, 2, 1, 2, 5, 16]),
}
GROUPED = {
    "3-D": ([4, 5, 32], [2, 9, 32], [2, 9, 32]),
    "4-D": ([2, 6, 5, 64], [2, 2, 9, 64], [2, 2, 9, 64]),
    "one row": ([1, 8, 1, 128], [1, 2, 40, 128], [1, 2, 40, 128]),
    "one key head": ([2, 4, 3, 64], [2, 1, 9, 64], [2, 1, 9, 64]),
    "as many": ([2, 4, 3, 64], [2, 4, 9, 64], [2, 4, 9, 64]),
    "fewer value heads": ([2, 8, 3, 64], [2, 4, 9, 64], [2, 2, 9, 64]),
    "one batch of keys": ([3, 4, 3, 64], [1, 2, 9, 64], [1, 2, 9, 64]),
    "5-D": ([2, 3, 4, 5, 16], [2, 1, 2, 7, 16], [1, 3, 2, 7, 16]),
}


def tensors(shapes: tuple[list[int], ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def make_mask(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Each row of it shows a key, as the original has no one answer where none is seen."""
    visible = torch.rand(shape) < 0.7
    visible[..., :1] = True
    if kind == "bool":
        return visible
    bias = torch.randn(shape).masked_fill(~visible, -torch.inf)
    return bias if kind == "float32" else bias.to(dtype)


def scores_of(shapes: tuple[list[int], ...]) -> tuple[int, ...]:
    lead = torch.broadcast_shapes(*(shape[:-2] for shape in shapes))
    return (*lead, shapes[0][-2], shapes[1][-2])


@pytest.mark.parametrize("kind", ["none", "causal", "scale", "bool", "float", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes(shapes: Any, dtype: torch.dtype, kind: str) -> None:
    options: dict[str, Any] = {}
    if kind == "causal":
        options["is_causal"] = True
    elif kind == "scale":
        options["scale"] = random.choice([1.7, -0.6, 0.0]) * shapes[0][-1] ** -0.5
    elif kind != "none":
        options["attn_mask"] = make_mask(kind, scores_of(shapes), dtype)
    check(*tensors(shapes, dtype), **options)


def test_scale_of_another_type() -> None:
    for scale in (1, True, torch.tensor(0.5)):
        check(*tensors(([2, 3, 4], [2, 5, 4], [2, 5, 4]), torch.float32), scale=scale)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shapes", GROUPED.values(), ids=GROUPED)
def test_groups(shapes: Any, dtype: torch.dtype, kind: str) -> None:
    options: dict[str, Any] = {"is_causal": kind == "causal"}
    if kind in ("bool", "float"):
        heads = shapes[0][-3]
        lead = torch.broadcast_shapes(*(shape[:-3] for shape in shapes))
        full = (*lead, heads, shapes[0][-2], shapes[1][-2])
        options["attn_mask"] = make_mask(kind, full, dtype)
    check(*tensors(shapes, dtype), **options, enable_gqa=True)


@pytest.mark.parametrize("kind", ["bool", "float", "float32"])
@pytest.mark.parametrize("name", ["3-D", "4-D", "5-D", "5-D, broadcast", "6-D"])
def test_masks_broadcast_in_each_axis(name: str, kind: str) -> None:
    shapes = SHAPES[name]
    full = scores_of(shapes)
    inputs = tensors(shapes, torch.bfloat16)
    for kept in itertools.product([False, True], repeat=len(full)):
        sizes = tuple(n if keep else 1 for n, keep in zip(full, kept, strict=True))
        check(*inputs, attn_mask=make_mask(kind, sizes, torch.bfloat16))
    for axes in range(2, len(full)):
        check(*inputs, attn_mask=make_mask(kind, full[-axes:], torch.bfloat16))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_layouts(data: Any) -> None:
    """Tensors of any order of axes, cut out of larger ones or stepped through."""
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    q_len, kv_len = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    head_dim = data.draw(st.sampled_from([1, 7, 16, 64, 80]))
    dtype = data.draw(st.sampled_from(DTYPES))

    def laid_out(*sizes: int) -> torch.Tensor:
        order = data.draw(st.permutations(range(len(sizes))))
        step = data.draw(st.integers(1, 3))
        axis = data.draw(st.integers(0, len(sizes) - 1))
        stored = [sizes[i] for i in order]
        stored[axis] *= step
        start = data.draw(st.integers(0, step - 1))
        cut = torch.randn(stored).to(dtype).narrow(axis, start, stored[axis] - start)
        cut = cut[(slice(None),) * axis + (slice(None, None, step),)]
        return cut.permute([order.index(i) for i in range(len(sizes))])

    query = laid_out(batch, heads, q_len, head_dim)
    key, value = (laid_out(batch, heads, kv_len, head_dim) for _ in range(2))
    mask = laid_out(batch, heads, q_len, kv_len) if data.draw(st.booleans()) else None
    options = {"attn_mask": mask, "is_causal": mask is None and data.draw(st.booleans())}
    result, naive = attend(query, key, value, **options), original(query, key, value, **options)
    judge(result, expected(query, key, value, **options), naive, name_of(dtype))


def test_result_is_laid_out_as_the_originals() -> None:
    """What follows often takes a view that only the layout of the query allows."""
    for shapes in (SHAPES["4-D"], SHAPES["narrow values"]):
        inputs = [
            t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors(shapes, DTYPES[0])
        ]
        result = check(*inputs)
        if inputs[0].shape[-1] == inputs[2].shape[-1]:
            result.transpose(1, 2).view(*result.shape[:1], result.shape[2], -1)


def test_negated_views() -> None:
    """A view that PyTorch negates as it is read."""
    query, key, value = (torch.randn(1, 2, 5, 8, dtype=torch.cfloat).conj().imag for _ in range(3))
    assert query.is_neg()
    check(query, key, value)


@pytest.mark.parametrize("axis", range(4))
def test_empty_results(axis: int) -> None:
    """Batch, heads, rows or value_dim of 0."""
    sizes = {"query": [2, 2, 3, 8], "key": [2, 2, 5, 8], "value": [2, 2, 5, 8]}
    for name in sizes:
        if axis < 2 or (axis == 2 and name == "query") or (axis == 3 and name == "value"):
            sizes[name][axis] = 0
    inputs = {name: torch.randn(shape) for name, shape in sizes.items()}
    assert attend(**inputs).shape == original(**inputs).shape


@pytest.mark.parametrize("value_dim", [8, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_that_see_nothing(kind: str, dtype: torch.dtype, value_dim: int) -> None:
    """They are 0. The original gives 0 or NaN, as its version and the kernel that it picks go."""
    query, key, value = tensors(([2, 2, 3, 8], [2, 2, 5, 8], [2, 2, 5, value_dim]), dtype)
    mask = make_mask(kind, (3, 5), dtype)
    mask[1] = False if kind == "bool" else -torch.inf
    result, naive = attend(query, key, value, mask), original(query, key, value, mask)
    assert (result[..., 1, :] == 0).all()
    assert (naive[..., 1, :].nan_to_num() == 0).all()
    judge(result, expected(query, key, value, mask), naive, name_of(dtype))


@pytest.mark.parametrize("options", [{}, {"causal": True, "q_offset": 0}, {"scale": 0.25}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_same_bits_as_keyfolds_own(dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs = tensors(([2, 4, 5, 64], [2, 2, 301, 64], [2, 2, 301, 64]), dtype)
    own = keyfold.scaled_dot_product_attention(*inputs, **options)
    result = attend(
        *inputs, is_causal="causal" in options, scale=options.get("scale"), enable_gqa=True
    )
    assert torch.equal(own, result)
    folded = [t.reshape(2, 1, *t.shape[1:]) for t in inputs]
    again = attend(
        *folded, is_causal="causal" in options, scale=options.get("scale"), enable_gqa=True
    )
    assert torch.equal(own, again.squeeze(1))


def test_long() -> None:
    inputs = tensors(([1, 4, 2, 64], [1, 1, 131_072, 64], [1, 1, 131_072, 64]), torch.float16)
    check(*inputs, enable_gqa=True)
    assert keyfold.last_report().dispatches > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast(dtype: torch.dtype) -> None:
    """Mixed dtypes become one, as the original's do."""
    query, key, value = tensors(SHAPES["4-D"], torch.float32)
    mask = make_mask("float32", (5, 9), torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        result, naive = attend(query, key, value.to(dtype), mask), original(query, key, value, mask)
    assert result.dtype == naive.dtype == dtype
    cast = [t.to(dtype) for t in (query, key, value, mask)]
    judge(result, expected(*cast), naive, name_of(dtype))
    assert torch.equal(result, attend(*cast))


def test_signature_is_the_originals() -> None:
    theirs = torch.ops.aten.scaled_dot_product_attention.default._schema.arguments
    ours = inspect.signature(attend).parameters.values()
    assert [p.name for p in ours] == [a.name for a in theirs]
    assert [p.kind is p.KEYWORD_ONLY for p in ours] == [a.kwarg_only for a in theirs]
    for ours_one, theirs_one in zip(ours, theirs, strict=True):
        required = not theirs_one.has_default_value()
        assert ours_one.default == (
            inspect.Parameter.empty if required else theirs_one.default_value
        )


def test_gradients_are_refused_where_they_would_be_lost() -> None:
    names = ["query", "key", "value", "attn_mask"]
    for wanted in names:
        given = [*tensors(SHAPES["4-D"], torch.float32), torch.randn(5, 9)]
        inputs = dict(zip(names, given, strict=True))
        inputs[wanted].requires_grad_()
        with pytest.raises(keyfold.InvalidArgument, match=f"^{wanted}: .* requires no gradient"):
            attend(**inputs)
        detached = attend(**{name: tensor.detach() for name, tensor in inputs.items()})
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                result = attend(**inputs)
            assert not result.requires_grad
            assert torch.equal(result, detached)


def test_inference_tensors() -> None:
    with torch.inference_mode():
        check(*tensors(SHAPES["4-D"], torch.float32))


Q, K, V = [2, 4, 3, 8], [2, 4, 5, 8], [2, 4, 5, 8]
WRONG = {
    "dropout": ("dropout_p", {"dropout_p": 0.5}),
    "negative dropout": ("dropout_p", {"dropout_p": -0.1}),
    "dropout NaN": ("dropout_p", {"dropout_p": float("nan")}),
    "causal and mask": ("attn_mask", {"is_causal": True, "attn_mask": torch.ones(3, 5).bool()}),
    "meta query": ("query", {"query": torch.randn(Q, device="meta")}),
    "meta key": ("key", {"key": torch.randn(K, device="meta")}),
    "meta value": ("value", {"value": torch.randn(V, device="meta")}),
    "meta mask": ("attn_mask", {"attn_mask": torch.ones(3, 5, device="meta")}),
    "float64": ("query", {"query": torch.randn(Q).double()}),
    "float16 key": ("key", {"key": torch.randn(K).half()}),
    "float16 value": ("value", {"value": torch.randn(V).half()}),
    "float16 mask": ("attn_mask", {"attn_mask": torch.randn(3, 5).half()}),
    "float64 mask": ("attn_mask", {"attn_mask": torch.randn(3, 5).double()}),
    "integer mask": ("attn_mask", {"attn_mask": torch.ones(3, 5, dtype=torch.uint8)}),
    "heads": ("key", {"key": torch.randn(2, 2, 5, 8), "value": torch.randn(2, 2, 5, 8)}),
    "value heads": ("value", {"value": torch.randn(2, 2, 5, 8)}),
    "groups": ("key", {"key": torch.randn(2, 3, 5, 8), "enable_gqa": True}),
    "value groups": ("value", {"value": torch.randn(2, 8, 5, 8), "enable_gqa": True}),
    "batch": ("query, key, value", {"key": torch.randn(3, 4, 5, 8)}),
    "head_dim": ("key", {"key": torch.randn(2, 4, 5, 7)}),
    "head_dim 0": ("query", {"query": torch.randn(2, 4, 3, 0), "key": torch.randn(2, 4, 5, 0)}),
    "length": ("value", {"value": torch.randn(2, 4, 6, 8)}),
    "1-D": ("query", {"query": torch.randn(8)}),
    "mask's keys": ("attn_mask", {"attn_mask": torch.randn(3, 4)}),
    "mask's batch": ("attn_mask", {"attn_mask": torch.randn(3, 1, 3, 5)}),
    "mask's axes": ("attn_mask", {"attn_mask": torch.randn(2, 2, 4, 3, 5)}),
    "scale": ("scale", {"scale": float("inf")}),
}


@pytest.mark.parametrize(("named", "change"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(named: str, change: dict[str, Any]) -> None:
    inputs = {"query": torch.randn(Q), "key": torch.randn(K), "value": torch.randn(V)}
    with pytest.raises(keyfold.InvalidArgument, match=f"^{named}: expected .*got ") as caught:
        attend(**{**inputs, **change})
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_no_tensor(name: str) -> None:
    inputs = {"query": torch.randn(Q), "key": torch.randn(K), "value": torch.randn(V)}
    with pytest.raises(TypeError, match=f"^{name}: expected a tensor, got list"):
        attend(**{**inputs, name: [1.0]})
    if name != "attn_mask":
        with pytest.raises(TypeError, match=f"^{name}: expected a tensor, got NoneType"):
            attend(**{**inputs, name: None})
