"""keyfold.mlx against mx.fast.scaled_dot_product_attention, judged by a float64 reference."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import keyfold
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import DTYPES, Floats, Result, as_numpy, attention, judge

mx = pytest.importorskip(
    "mlx.core", reason="keyfold.mlx is NOT tested: mlx is not installed (pip install 'mlx[cpu]')"
)
import keyfold.mlx  # noqa: E402

Rng = np.random.Generator
original = mx.fast.scaled_dot_product_attention
drop_in = keyfold.mlx.scaled_dot_product_attention


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for prefix, what in itertools.product(("KEYFOLD", "MLX_SDPA"), ("SIZE", "THRESHOLD")):
        monkeypatch.delenv(f"{prefix}_CHUNK_{what}", raising=False)
    return monkeypatch


def to_mlx(array: npt.NDArray[Any]) -> Any:
    if array.dtype == DTYPES["bfloat16"]:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def to_numpy(array: Any) -> npt.NDArray[Any]:
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16), order="C").view(DTYPES["bfloat16"])
    return np.array(array, order="C")


def bits(array: Any) -> npt.NDArray[Any]:
    """The bytes of a result of either library."""
    return (array if isinstance(array, np.ndarray) else to_numpy(array)).view(np.uint8)


def normal(rng: Rng, *shape: int, dtype: str = "float32") -> Any:
    array = rng.standard_normal(shape, np.float32)
    if dtype == "int32":
        return to_mlx((4 * array).astype(np.int32))
    return to_mlx(array.astype(DTYPES[dtype]))


def visible(rng: Rng, *shape: int) -> Any:
    """A boolean mask that leaves every row key 0: MLX gives the others another result."""
    mask = rng.random(shape) < 0.6
    mask[..., 0] = True
    return mx.array(mask)


def compare(
    q: Any, k: Any, v: Any, *, scale: float, mask: Any = None, sinks: Any = None
) -> tuple[Any, Result, Floats]:
    """Results of the drop-in, of float64 and of the original for the same call."""
    theirs = original(q, k, v, scale=scale, mask=mask, sinks=sinks)
    ours = drop_in(q, k, v, scale=scale, mask=mask, sinks=sinks)
    assert isinstance(ours, mx.array)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    dtype = ours.dtype
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        mask = mask.astype(dtype)
    causal = isinstance(mask, str)
    exact = attention(
        *(x.astype(dtype) for x in (q, k, v)),
        scale=scale,
        mask=None if causal else mask,
        causal=causal,
        sinks=sinks if sinks is None else sinks.astype(dtype),
    )
    return ours, exact, as_numpy(theirs)


# What each makes of (rng, heads, q_len, kv_len); the batch is 2.
MASKS = {
    "none": lambda r, h, n, m: None,
    "causal": lambda r, h, n, m: "causal",
    "bool": lambda r, h, n, m: visible(r, 2, h, n, m),
    "bool-keys": lambda r, h, n, m: visible(r, m),
    "bool-batch": lambda r, h, n, m: visible(r, 2, 1, 1, m),
    "bool-heads": lambda r, h, n, m: visible(r, h, n, m),
    "add": lambda r, h, n, m: normal(r, 2, h, n, m, dtype="float16"),
    "add-scalar": lambda r, h, n, m: normal(r, dtype="float16"),
    "add-per-row": lambda r, h, n, m: normal(r, n, 1, dtype="float16"),
    "add-per-head": lambda r, h, n, m: normal(r, h, 1, 1, dtype="float16"),
    "add-batch": lambda r, h, n, m: normal(r, 2, 1, n, m, dtype="float16"),
    "add-hides": lambda r, h, n, m: mx.where(visible(r, n, m), 0.0, -mx.inf).astype(mx.float16),
    "add-integers": lambda r, h, n, m: normal(r, n, m, dtype="int32"),
}
MIXTURES = {
    "float32": ("float32",) * 3,
    "float16": ("float16",) * 3,
    "bfloat16": ("bfloat16",) * 3,
    "halves": ("float16", "bfloat16", "bfloat16"),
    "wide-q": ("float32", "float16", "float16"),
    "integer-k": ("float16", "int32", "float16"),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_grid(mixture: str, head_dim: int, mask: str, rng: Rng) -> None:
    """Judges the shapes together, each scaled by its size: over few rows the original is lucky."""
    types = MIXTURES[mixture]
    lengths = ((1, 97, head_dim), (7, 130, 48), (20, 20, head_dim))
    pooled: list[list[Floats]] = [[], [], []]
    noise = 0.0
    for group, (q_len, kv_len, value_dim) in itertools.product((1, 4, 8), lengths):
        q = normal(rng, 2, 2 * group, q_len, head_dim, dtype=types[0])
        k = normal(rng, 2, 2, kv_len, head_dim, dtype=types[1])
        v = normal(rng, 2, 2, kv_len, value_dim, dtype=types[2])
        array = MASKS[mask](rng, 2 * group, q_len, kv_len)
        if mixture == "bfloat16" and mask.startswith("add"):
            array = array.astype(mx.bfloat16)  # no float16: that would promote to float32
        sink_type = {1: "int32", 20: types[2]}.get(q_len)
        sinks = sink_type and normal(rng, 2 * group, dtype=sink_type)
        ours, exact, theirs = compare(q, k, v, scale=head_dim**-0.5, mask=array, sinks=sinks)
        size = np.abs(exact.out).max()
        noise = max(noise, exact.out_noise / size)
        for pool, result in zip(pooled, (as_numpy(ours), exact.out, theirs), strict=True):
            pool.append(result.ravel() / size)
    out, expected, naive = map(np.concatenate, pooled)
    judge(out, expected, naive, str(ours.dtype).rpartition(".")[2], noise)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_bits_are_those_of_the_plain_call(data: st.DataObject, seed: int) -> None:
    """Whatever the shape, the layout, the mask and the scale; the original is near."""
    rng = np.random.default_rng(seed)
    batch, kv_heads, group, q_len = (data.draw(st.integers(1, 9)) for _ in range(4))
    kv_len, head_dim, value_dim = (data.draw(st.integers(1, n)) for n in (600, 70, 70))
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    step = st.sampled_from([1, -1])
    heads = kv_heads * group
    q = normal(rng, batch, q_len, heads, head_dim, dtype=dtype).swapaxes(1, 2)
    k = normal(rng, batch, kv_heads, kv_len, 2 * head_dim, dtype=dtype)[
        :, :: data.draw(step), :, ::2
    ]
    v = normal(rng, batch, kv_heads, kv_len + 3, value_dim, dtype=dtype)[:, :, 3:]
    full = (batch, heads, q_len, kv_len)
    axes = data.draw(st.integers(1, 4))
    shape = tuple(data.draw(st.sampled_from(sorted({1, n}))) for n in full[4 - axes :])
    mask = data.draw(st.sampled_from(["none", "causal", "bool", "add"]))
    if mask in ("bool", "add"):
        mask = visible(rng, *shape) if mask == "bool" else normal(rng, *shape, dtype=dtype)
        mask = mask[::-1] if axes > 1 else mask
    elif mask == "none" or q_len > kv_len:  # MLX has another result for rows that see nothing
        mask = None
    sinks = data.draw(st.sampled_from([None, normal(rng, heads, dtype=dtype)[:: data.draw(step)]]))
    scale = data.draw(st.floats(-2, 2))
    out = drop_in(q, k, v, scale=scale, mask=mask, sinks=sinks)

    causal = isinstance(mask, str)
    arrays = {"q": q, "k": k, "v": v, "mask": None if causal else mask, "sinks": sinks}
    arrays = {name: x for name, x in arrays.items() if x is not None}
    dense = {name: to_numpy(x) for name, x in arrays.items()}
    plain = keyfold.scaled_dot_product_attention(**dense, scale=scale, causal=causal)
    np.testing.assert_array_equal(bits(out), bits(plain))
    wide = {n: x if x.dtype == mx.bool_ else x.astype(mx.float32) for n, x in arrays.items()}
    theirs = original(**{"mask": mask, **wide}, scale=scale)
    tolerance = 2e-3 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(as_numpy(out), as_numpy(theirs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_len", [1, 4])
def test_long_keys_are_read_in_place_and_exact(
    dtype: str, q_len: int, rng: Rng, env: pytest.MonkeyPatch
) -> None:
    q = normal(rng, 1, 2, q_len, 64, dtype=dtype)
    k, v = (normal(rng, 1, 1, 131_072, 64, dtype=dtype) for _ in "kv")
    mx.eval(q, k, v)
    drop_in(q, k, v, scale=0.125)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    drop_in(q, k, v, scale=0.125, mask="causal")
    assert mx.get_peak_memory() - before < 2**20  # k alone has 16 or 32 MiB
    out, exact, naive = compare(q, k, v, scale=0.125, mask="causal")
    judge(out, exact.out, naive, dtype, exact.out_noise)
    env.setenv("MLX_SDPA_CHUNK_SIZE", "32768")
    np.testing.assert_array_equal(bits(drop_in(q, k, v, scale=0.125, mask="causal")), bits(out))
    assert keyfold.last_report().dispatches >= 4


def decode(rng: Rng) -> tuple[Any, Any, Any]:
    return (normal(rng, 1, 4, 1, 64), *(normal(rng, 1, 2, 6000, 64) for _ in "kv"))


def test_environment_sets_the_chunks(rng: Rng, env: pytest.MonkeyPatch) -> None:
    q, k, v = decode(rng)
    results, dispatches = [], []
    for variables in (
        {"MLX_SDPA_CHUNK_THRESHOLD": "1000000"},
        {"MLX_SDPA_CHUNK_SIZE": "512"},
        {"MLX_SDPA_CHUNK_SIZE": "512", "MLX_SDPA_CHUNK_THRESHOLD": "6000"},
        {"MLX_SDPA_CHUNK_SIZE": "512", "MLX_SDPA_CHUNK_THRESHOLD": "6001"},
        {"MLX_SDPA_CHUNK_SIZE": "512", "KEYFOLD_CHUNK_SIZE": "6000"},
    ):
        with env.context() as variant:
            for item in variables.items():
                variant.setenv(*item)
            results.append(bits(drop_in(q, k, v, scale=0.125)))
        dispatches.append(keyfold.last_report().dispatches)
    one, many, at_threshold, below_threshold, keyfolds_own = dispatches
    assert one == below_threshold == keyfolds_own == 1
    assert many == at_threshold >= 6000 / 512
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("value", ["-1", "many", "1e3", "", "99999999999999999999", "0"])
@pytest.mark.parametrize("name", ["SIZE", "THRESHOLD"])
def test_bad_environment_is_named(name: str, value: str, rng: Rng, env: pytest.MonkeyPatch) -> None:
    env.setenv(f"MLX_SDPA_CHUNK_{name}", value)
    if (name, value) == ("THRESHOLD", "0"):  # the least threshold, but no size
        drop_in(*decode(rng), scale=0.125)
        return
    with pytest.raises(keyfold.InvalidArgument, match=rf"^MLX_SDPA_CHUNK_{name}.*{value}"):
        drop_in(*decode(rng), scale=0.125)


def test_rows_that_see_nothing(rng: Rng) -> None:
    """0 here; MLX gives mean(v) behind a boolean or causal mask, NaN behind -inf throughout."""
    q, k, v = normal(rng, 1, 4, 7, 32), normal(rng, 1, 2, 5, 32), normal(rng, 1, 2, 5, 48)
    mean = np.repeat(as_numpy(v).mean(axis=2), 2, axis=1)[:, :, None]
    shown = np.arange(7)[:, None] % 2 == np.ones(5, bool)  # every other row
    additive = mx.where(mx.array(shown), 0.0, -mx.inf)
    nan, odd = np.full_like(mean, np.nan), slice(0, None, 2)
    cases = [("causal", slice(2), mean), (mx.array(shown), odd, mean), (additive, odd, nan)]
    for mask, blank, theirs in cases:
        for sinks in (None, normal(rng, 4)):
            out = as_numpy(drop_in(q, k, v, scale=0.2, mask=mask, sinks=sinks))
            assert not out[:, :, blank].any()
            out[:, :, blank] = theirs if sinks is None else 0
            other = as_numpy(original(q, k, v, scale=0.2, mask=mask, sinks=sinks))
            np.testing.assert_allclose(out, other, atol=1e-5)


def test_no_keys_give_zero(rng: Rng) -> None:
    q, k = normal(rng, 1, 4, 3, 32), normal(rng, 1, 2, 0, 32)
    for attend in (original, drop_in):
        np.testing.assert_array_equal(as_numpy(attend(q, k, k, scale=0.2)), np.zeros(q.shape))


def small(rng: Rng, **changes: Any) -> dict[str, Any]:
    """Arguments of a good call, with changes; a function changes the argument of its name."""
    q, k, v = normal(rng, 2, 4, 3, 32), normal(rng, 2, 2, 5, 32), normal(rng, 2, 2, 5, 32)
    call = {"q": q, "k": k, "v": v, "scale": 0.2}
    return {**call, **{name: x(call[name]) if callable(x) else x for name, x in changes.items()}}


HALF = dict.fromkeys(("q", "k", "v"), lambda x: x.astype(mx.float16))
# What the original refuses too: the argument that ours names, and changes to a good call.
REFUSED = [
    ("mask", {"mask": "top-left"}),
    ("mask", {"mask": 1.0}),
    ("mask", {"mask": np.ones((3, 5), bool)}),
    ("mask", {"mask": mx.ones((1, 2, 4, 3, 5))}),
    ("mask", {"mask": mx.ones((2, 2, 3, 5))}),
    ("mask", {"mask": mx.ones((3, 4), mx.bool_)}),
    ("mask", {"mask": mx.ones((3, 5)), **HALF}),
    ("mask", {"mask": mx.ones((3, 5), mx.bfloat16), **HALF}),
    ("mask", {"mask": mx.ones((3, 5), mx.complex64)}),
    ("sinks", {"sinks": [1.0] * 4}),
    ("sinks", {"sinks": mx.ones(2)}),
    ("sinks", {"sinks": mx.ones((4, 1))}),
    ("sinks", {"sinks": mx.array(1.0)}),
    ("sinks", {"sinks": mx.ones(4), **HALF}),
    ("scale", {"scale": None}),
    ("scale", {"scale": "1"}),
    ("scale", {"scale": 1j}),
    ("q", {"q": np.array}),
    ("k", {"k": np.array}),
    ("v", {"v": lambda x: x.tolist()}),
    ("q", {"q": lambda x: x[0]}),
    ("k", {"k": lambda x: x[None]}),
    ("k", {"k": lambda x: x[:1]}),
    ("k", {"k": lambda x: x[..., :16]}),
    ("v", {"v": lambda x: x[:, :, 1:]}),
    ("v", {"v": lambda x: x[:, :1]}),
    ("num_heads", {"q": lambda x: x[:, :3]}),
    ("q, k, v", dict.fromkeys(("q", "k", "v"), lambda x: x.astype(mx.int32))),
    ("q, k, v", {"k": lambda x: x.astype(mx.complex64)}),
    ("stream", {"stream": mx.gpu}),
    ("stream", {"stream": "cpu"}),
]
# What the original takes, and keyfold does not.
ONLY_OURS = [
    ("q, k, v", {"k": lambda x: x.astype(mx.float64, stream=mx.cpu)}),
    ("scale", {"scale": np.inf}),
    ("scale", {"scale": 1e300}),
    ("q", {"q": lambda x: x[:, :, :0]}),
    ("q", {"q": lambda x: x[..., :0], "k": lambda x: x[..., :0]}),
    ("v", {"v": lambda x: x[..., :0]}),
]


@pytest.mark.parametrize(
    ("name", "changes", "both"), [(*c, True) for c in REFUSED] + [(*c, False) for c in ONLY_OURS]
)
def test_refusals_name_the_argument(name: str, changes: Any, both: bool, rng: Rng) -> None:
    if name == "stream" and mx.is_available(mx.gpu):
        pytest.skip("here the original has a GPU")
    call = small(rng, **changes)
    with pytest.raises((ValueError, TypeError)) if both else nullcontext():
        mx.eval(original(**call))
    with pytest.raises((keyfold.InvalidArgument, TypeError), match=f"^{name}: expected .*got "):
        drop_in(**call)


def test_other_forms_of_arguments(rng: Rng) -> None:
    call = small(rng, scale=0.5)
    expected = bits(drop_in(**call))
    streams = (None, mx.cpu, mx.Device(mx.cpu), mx.default_stream(mx.cpu), mx.new_stream(mx.cpu))
    forms = [
        *({"stream": stream} for stream in streams),
        *({"scale": s} for s in (np.float32(0.5), mx.array(0.5), mx.array([0.5]))),
        {"force_fused": False},
        {"mask": mx.array(True)},
        {"mask": None, "sinks": None},
    ]
    for form in forms:
        mx.eval(original(**{**call, **form}))  # it takes them too
        np.testing.assert_array_equal(bits(drop_in(**{**call, **form})), expected)
    np.testing.assert_array_equal(bits(drop_in(**call, force_fused=True)), expected)
    with pytest.raises(TypeError, match="positional"):
        drop_in(call["q"], call["k"], call["v"], 0.5)


def test_lazy_inputs_are_evaluated(rng: Rng) -> None:
    q, k, v = normal(rng, 1, 4, 3, 32), normal(rng, 1, 2, 9, 32), normal(rng, 1, 2, 9, 32)
    lazy = mx.exp(mx.concatenate([q, q]))[::-2], k + 1, mx.concatenate([v, 2 * v], axis=2)[:, :, 9:]
    out = drop_in(*lazy, scale=0.2)  # the one batch entry that is left has a negative stride
    evaluated = [mx.exp(q), k + 1, 2 * v]
    mx.eval(evaluated)
    np.testing.assert_array_equal(bits(out), bits(drop_in(*evaluated, scale=0.2)))


def test_result_does_not_keep_the_keys_alive(rng: Rng) -> None:
    q, k = normal(rng, 1, 4, 1, 64), normal(rng, 1, 1, 6000, 64)
    mx.eval(q, k)
    held, size = mx.get_active_memory(), k.nbytes
    out = drop_in(q, k, k, scale=0.125)
    del k
    assert mx.get_active_memory() < held - size / 2
    assert out.shape == q.shape


@pytest.mark.parametrize("which", ["q", "k", "v", "mask", "sinks"])
def test_transformations_are_refused_with_a_hint(which: str, rng: Rng) -> None:
    call = small(rng, mask=normal(rng, 2, 4, 3, 5), sinks=normal(rng, 4))

    def total(x: Any) -> Any:
        return drop_in(**{**call, which: x}).sum()

    array = call[which]
    for transformed, argument in ((mx.compile(total), array), (mx.vmap(total), array[None])):
        with pytest.raises(keyfold.InvalidArgument, match=rf"^{which}: .*mx\.fast\.scaled_dot"):
            transformed(argument)
    with pytest.raises(keyfold.InvalidArgument, match=r"no gradient.*mx\.stop_gradient"):
        mx.grad(total)(array)
    with pytest.raises(keyfold.InvalidArgument, match=r"no gradient.*mx\.stop_gradient"):
        mx.jvp(total, (array,), (array,))


def test_gradients_of_what_follows_are_right(rng: Rng) -> None:
    call = small(rng)
    weight = normal(rng, 32)

    def loss(weight: Any, attend: Any) -> Any:
        return (mx.stop_gradient(attend(**call)) * weight).sum()

    ours, theirs = (as_numpy(mx.grad(loss)(weight, f)) for f in (drop_in, original))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    stopped = mx.grad(lambda q: mx.stop_gradient(drop_in(**{**call, "q": q})).sum())(call["q"])
    assert not as_numpy(stopped).any()
