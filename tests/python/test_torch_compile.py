"""keyfold.torch inside the graphs of torch.compile, torch.export and torch.func."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import keyfold  # noqa: E402
from test_torch import attend, seeded, tensors  # noqa: E402, F401

OPERATOR = torch.ops.keyfold.attention.default
Q, KV = [2, 4, 5, 16], [2, 2, 9, 16]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, **options: Any
) -> torch.Tensor:
    """Something for the compiler to do before and after; exact, so that bits compare."""
    out = attend(query * 2, key.transpose(1, 2), value.transpose(1, 2), mask, **options)
    return out.transpose(1, 2).flatten(2) * 0.5


def inputs(kv_len: int = 9, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Keys and values as [batch, len, heads, dim]."""
    return tensors(([2, 4, 5, 16], [2, kv_len, 2, 16], [2, kv_len, 2, 16]), dtype)


def options_of(kind: str) -> dict[str, Any]:
    mask = {"bool": torch.rand(5, 9) < 0.5, "float": torch.randn(2, 1, 1, 9)}.get(kind)
    return {"mask": mask, "is_causal": kind == "causal", "enable_gqa": True}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_has_the_same_bits(backend: str, kind: str, dynamic: bool) -> None:
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("inductor needs a C++ compiler, and none is on the PATH")
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=dynamic)
    for dtype in (torch.float32, torch.bfloat16):
        given = inputs(dtype=dtype)
        options = options_of(kind)
        assert torch.equal(compiled(*given, **options), block(*given, **options))


@pytest.mark.parametrize("axes", [2, 3, 5])
def test_compiled_with_other_axes(axes: int) -> None:
    shapes = {2: [9, 16], 3: [4, 9, 16], 5: [3, 2, 4, 9, 16]}
    given = tensors((shapes[axes],) * 3, torch.float32)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    mask = torch.rand(9, 9) < 0.5
    assert torch.equal(compiled(*given, mask), attend(*given, mask))


def test_one_graph_serves_all_lengths() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    for kv_len in (9, 13, 200):
        given = inputs(kv_len)
        result = compiled(*given, enable_gqa=True)
        assert torch.equal(result, block(*given, enable_gqa=True))
    assert len(graphs) == 1
    assert [node.target for node in graphs[0].graph.nodes].count(OPERATOR) == 1


def test_exported() -> None:
    class Module(torch.nn.Module):
        def forward(
            self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            return block(query, key, value, is_causal=True, enable_gqa=True)

    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {"query": {}, "key": {1: length}, "value": {1: length}}
    program = torch.export.export(Module(), tuple(inputs()), dynamic_shapes=shapes)
    given = inputs(31)
    result = program.module()(*given)
    assert torch.equal(result, block(*given, is_causal=True, enable_gqa=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap() -> None:
    query, key, value = tensors(([3, *Q], [3, *KV], [3, *KV]), torch.float32)
    mapped = torch.func.vmap(lambda q, k, v: attend(q, k, v, enable_gqa=True))
    result = mapped(query, key, value)
    assert torch.equal(result, attend(query, key, value, enable_gqa=True))


@pytest.mark.parametrize("value_dim", [16, 24])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "q_offset": 3, "softcap": 20.0, "scale": 0.5},
        {"mask": torch.rand(5, 9) < 0.5, "sinks": torch.randn(4)},
    ],
    ids=["plain", "causal", "mask"],
)
def test_operator(options: dict[str, Any], transposed: bool, value_dim: int) -> None:
    given = tensors((Q, KV, [*KV[:-1], value_dim]), torch.float32)
    if transposed:
        given = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in given]
    torch.library.opcheck(OPERATOR, given, options)
    own = keyfold.scaled_dot_product_attention(*given, **options)
    assert torch.equal(OPERATOR(*given, **options), own)


# A break that an exception makes gives it as in eager code; without breaks it comes wrapped.
ERRORS = {False: keyfold.InvalidArgument, True: torch._dynamo.exc.Unsupported}


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradients(backend: str, fullgraph: bool) -> None:
    given = inputs()
    given[1].requires_grad_()
    compiled = torch.compile(block, backend=backend, fullgraph=fullgraph)
    with pytest.raises(ERRORS[fullgraph], match="key: expected a tensor that requires no gradient"):
        compiled(*given, enable_gqa=True)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            result = compiled(*given, enable_gqa=True)
            assert torch.equal(result, block(*given, enable_gqa=True))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_wrong_arguments(fullgraph: bool) -> None:
    compiled = torch.compile(block, backend="eager", fullgraph=fullgraph)
    with pytest.raises(ERRORS[fullgraph], match="key: expected 4 heads, or 1, got 2"):
        compiled(*inputs())
