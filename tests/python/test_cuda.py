"""PyTorch tensors on a CUDA device: their stream, the bits of the host path, CUDA graphs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keyfold
import pytest

torch = pytest.importorskip("torch")
attend = keyfold.scaled_dot_product_attention

ABSENT = (
    "a CUDA device for PyTorch"
    if not torch.cuda.is_available()
    else "keyfold's CUDA backend"
    if all(device.backend != "cuda" for device in keyfold.devices())
    else ""
)
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"{ABSENT} is ABSENT: nothing was tested")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Q, K, V = (2, 4, 33, 64), (2, 2, 700, 64), (2, 2, 700, 64)


@pytest.fixture
def normal(seed: int) -> Callable[..., Any]:
    """Make normal numbers of a shape on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return lambda *shape, dtype=torch.float32: torch.randn(
        shape, generator=generator, device="cuda"
    ).to(dtype)


def on_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def check(q: Any, k: Any, v: Any, **options: Any) -> None:
    """Compare with the same call on host tensors, bit for bit."""
    out, lse = attend(q, k, v, return_lse=True, **options)
    assert out.device == lse.device == q.device
    assert out.dtype == q.dtype
    assert keyfold.last_report().backend == "cuda"
    host = {name: on_host(value) for name, value in options.items()}
    expected, expected_lse = attend(
        *(x.cpu() for x in (q, k, v)), return_lse=True, backend="cuda", **host
    )
    assert torch.equal(out.cpu(), expected)
    assert torch.equal(lse.cpu(), expected_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_len", [1, 33])
def test_the_bits_of_the_host_path(normal: Any, dtype: Any, q_len: int) -> None:
    q, k, v = normal(2, 4, q_len, 64, dtype=dtype), normal(*K, dtype=dtype), normal(*V, dtype=dtype)
    check(q, k, v)
    check(q, k, v, causal=True)
    check(q, k, v, window=(100, 0), softcap=3.0, sinks=normal(4))
    check(q, k, v, kv_lens=[650, 3], causal=True, sinks=normal(4, dtype=dtype))
    check(q, k, v, mask=normal(2, 1, q_len, 700) > 0)
    check(q, k, v, mask=normal(700, 4, dtype=dtype).t()[:, None])
    check(q, k, v, mask=normal(q_len, 1400)[:, ::2], chunk_size=1)
    check(q, k, v, max_scratch_bytes=40_000_000)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_len", [1, 33])
def test_any_strides(normal: Any, dtype: Any, q_len: int) -> None:
    def odd(*shape: int) -> Any:  # what no kernel reads in place
        return normal(*shape[:3], 2 * shape[3] + 2, dtype=dtype)[..., 1:-1:2]

    q, k, v = normal(2, 4, q_len, 64, dtype=dtype), normal(*K, dtype=dtype), normal(*V, dtype=dtype)
    check(odd(2, 4, q_len, 40), odd(2, 2, 5000, 40), odd(2, 2, 5000, 24))
    check(q[..., 1:], k[..., 1:], v[..., :7])
    check(*(normal(2, x.shape[2], x.shape[1], 64, dtype=dtype).transpose(1, 2) for x in (q, k, v)))
    check(q, k[:, :1].expand(-1, 4, -1, -1), v[:, :1].expand(-1, 4, -1, -1))
    check(q, k[:, :, :1].expand(-1, -1, 700, -1), v)
    out = torch.full((2, q_len, 4, 64), 7.0, dtype=dtype, device="cuda").transpose(1, 2)
    assert attend(q, k, v, out=out) is out
    assert torch.equal(out, attend(q, k, v))


def test_no_keys(normal: Any) -> None:
    q = normal(*Q)
    out, lse = attend(q, q[:, :, :0], q[:, :, :0], return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_what_was_queued_elsewhere_comes_first(normal: Any) -> None:
    q, k, v = normal(2, 4, 1, 64), normal(*K), normal(*V)
    expected = attend(q, k, v)
    here, there = torch.cuda.Stream(), torch.cuda.Stream()
    for stream in (here, here.cuda_stream):
        late = [torch.zeros_like(x) for x in (q, k, v)]
        out = torch.zeros_like(q)
        torch.cuda.synchronize()
        with torch.cuda.stream(there):  # PyTorch's current stream, which the call's has to wait for
            torch.cuda._sleep(50_000_000)
            for to, x in zip(late, (q, k, v), strict=True):
                to.copy_(x)
            attend(*late, out=out, stream=stream)
            assert not there.query()
            assert not here.query()  # nothing was waited for
        here.synchronize()
        assert torch.equal(out, expected)


def test_the_current_stream(normal: Any) -> None:
    q, k, v = normal(2, 4, 1, 64), normal(*K), normal(*V)
    expected = attend(q, k, v)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = attend(q, k, v) + 0  # PyTorch has memory for this stream then, and need not wait
        del out
        torch.cuda._sleep(50_000_000)
        out = attend(q, k, v) + 0
        assert not stream.query()
    stream.synchronize()
    assert torch.equal(out, expected)


def test_cupy(normal: Any) -> None:
    cupy = pytest.importorskip("cupy")
    q, k, v = normal(2, 4, 1, 64), normal(*K), normal(*V)
    expected, expected_lse = attend(q, k, v, return_lse=True)
    theirs = [cupy.from_dlpack(x) for x in (q, k, v)]
    with cupy.cuda.Stream(non_blocking=True) as stream:
        out, lse = attend(*theirs, return_lse=True)
        stream.synchronize()
    assert isinstance(out, cupy.ndarray)
    assert torch.equal(torch.from_dlpack(out), expected)
    assert torch.equal(torch.from_dlpack(lse), expected_lse)
    with stream:  # of which PyTorch, whose tensor q is, knows nothing
        out = attend(q, *theirs[1:], stream=stream)
        stream.synchronize()
    assert torch.equal(out, expected)


def capture(call: Callable[[], Any]) -> tuple[Any, Any]:
    """Give a graph of the call, and its result."""
    call()  # kernels are loaded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_graphs(normal: Any, dtype: Any, chunk_size: int | None) -> None:
    q, k, v = (
        normal(2, 4, 1, 64, dtype=dtype),
        normal(2, 2, 5000, 64, dtype=dtype),
        normal(2, 2, 5000, 64, dtype=dtype),
    )
    mask = normal(2, 1, 1, 5000) > 0
    lengths = torch.tensor([5000, 17], dtype=torch.int32, device="cuda")
    options = {"mask": mask, "window": (2000, 0), "softcap": 5.0, "chunk_size": chunk_size}
    graph, out = capture(lambda: attend(q, k, v, kv_lens=lengths, **options))
    for _ in range(3):
        for x in (q, k, v):
            x.copy_(normal(*x.shape, dtype=dtype))
        lengths.copy_(torch.randint(0, 5001, (2,)))
        graph.replay()
        expected = attend(q, k, v, kv_lens=lengths.tolist(), **options)
        assert torch.equal(out, expected)


def test_a_graph_of_many_layers(normal: Any) -> None:
    q, k, v = normal(1, 8, 1, 128), normal(1, 2, 3000, 128), normal(1, 2, 3000, 128)

    def layers() -> Any:
        x = q
        for _ in range(4):
            x = attend(x, k, v)
        return x

    graph, out = capture(layers)
    q.copy_(normal(*q.shape))
    graph.replay()
    assert torch.equal(out, layers())


def test_lengths_on_the_device(normal: Any) -> None:
    q, k, v = normal(*Q), normal(*K), normal(*V)
    lengths = torch.tensor([650, 3], dtype=torch.int32, device="cuda")
    for options in ({"causal": True}, {"window": (5, 9)}, {"causal": True, "q_offset": 600}, {}):
        expected = attend(q, k, v, kv_lens=[650, 3], **options)
        assert torch.equal(attend(q, k, v, kv_lens=lengths, **options), expected)
    far = torch.tensor([9999, -1], dtype=torch.int32, device="cuda")
    assert torch.equal(attend(q, k, v, kv_lens=far), attend(q, k, v, kv_lens=[700, 0]))
    for wrong in (lengths.long(), lengths[:1], lengths[None]):
        with pytest.raises(keyfold.InvalidArgument, match="^kv_lens: "):
            attend(q, k, v, kv_lens=wrong)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator(normal: Any, dtype: Any) -> None:
    from keyfold.torch import scaled_dot_product_attention

    q, k, v = (normal(2, 4, n, 64, dtype=dtype) for n in (33, 70, 70))
    mask = normal(33, 70) > 0
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    out = scaled_dot_product_attention(q, k, v, mask)
    assert out.device == q.device
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-6 if dtype == DTYPES[0] else 2e-2)
    with pytest.raises(keyfold.InvalidArgument, match="^key: .*cuda:0, where query is.*cpu"):
        scaled_dot_product_attention(q, k.cpu(), v)
    with torch.autocast("cuda", torch.float16):
        assert scaled_dot_product_attention(q, k, v).dtype == torch.float16


def test_the_documents() -> None:
    page = (Path(__file__).parents[2] / "docs/python.md").read_text()
    blocks = [b for b in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "cuda" in b]
    assert blocks
    for block in blocks:
        names: dict[str, Any] = {}
        exec(compile(block, "docs/python.md", "exec"), names)
        q, k, v, lengths = (names[name] for name in ("q", "k", "v", "lengths"))
        assert torch.equal(names["out"], attend(q, k, v, kv_lens=lengths.tolist()))


def test_errors(normal: Any) -> None:
    q, k, v = normal(*Q), normal(*K), normal(*V)
    with pytest.raises(keyfold.InvalidArgument, match="^k: .*CUDA device 0.*host memory"):
        attend(q, k.cpu(), v)
    with pytest.raises(keyfold.InvalidArgument, match="^[kv]: .*host memory"):
        attend(q.cpu(), k, v)
    with pytest.raises(keyfold.InvalidArgument, match="^mask: .*host memory"):
        attend(q, k, v, mask=torch.ones(33, 700, dtype=torch.bool))
    with pytest.raises(keyfold.InvalidArgument, match="^out: .*host memory"):
        attend(q, k, v, out=torch.empty(Q))
    with pytest.raises(keyfold.UnsupportedError, match="cpu: it can't reach memory on CUDA"):
        attend(q, k, v, backend="cpu")
    with pytest.raises(keyfold.InvalidArgument, match="^stream: "):
        attend(q.cpu(), k.cpu(), v.cpu(), stream=torch.cuda.current_stream())
    with pytest.raises(TypeError, match="^stream: "):
        attend(q, k, v, stream="default")
    with pytest.raises(keyfold.InvalidArgument, match="^q: .*host memory"):
        keyfold.AttentionState(q)
