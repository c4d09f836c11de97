"""keyfold.scaled_dot_product_attention on NumPy arrays, against float64."""

from __future__ import annotations

from typing import Any

import keyfold
import numpy as np
import pytest
from conftest import SEED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import DTYPES, attention, judge, make_inputs

attend = keyfold.scaled_dot_product_attention


@st.composite
def calls(draw: st.DrawFn) -> tuple[tuple[Any, Any, Any], dict[str, Any], str]:
    """Inputs, the options of a formula, and the name of the dtype."""
    rng = np.random.default_rng([SEED, draw(st.integers(0, 2**32 - 1))])
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    batch, q_len = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    kv_len = draw(st.sampled_from([0, 1, 2, 31, 511, 512, 513, 1100]))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    inputs = make_inputs(
        rng,
        q_len,
        kv_len,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 8, 40, 64, 80])),
        value_dim=draw(st.sampled_from([None, 1, 17, 64])),
        batch=batch,
        dtype=dtype,
    )
    bias = rng.standard_normal((kv_heads * group, q_len, kv_len), np.float32)
    options: dict[str, Any] = {
        "scale": draw(st.sampled_from([None, 0.3])),
        "causal": draw(st.booleans()),
        "q_offset": draw(st.sampled_from([None, 0, 7, -3])),
        "window": draw(st.sampled_from([None, (5, None), (None, 2), (100, 0)])),
        "softcap": draw(st.sampled_from([None, 1.5])),
        "mask": draw(
            st.sampled_from(
                [
                    None,
                    bias,
                    bias.astype(DTYPES[dtype]),
                    rng.random((batch, 1, q_len, kv_len)) < 0.7,
                ]
            )
        ),
        "sinks": draw(st.sampled_from([None, rng.standard_normal(kv_heads * group, np.float32)])),
        "kv_lens": draw(st.sampled_from([None, rng.integers(0, kv_len + 1, batch)])),
    }
    return inputs, options, dtype


@given(call=calls())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_matches_float64(call: Any) -> None:
    (q, k, v), options, dtype = call
    out, lse = attend(q, k, v, **options, return_lse=True)
    assert out.dtype == q.dtype
    assert lse.dtype == np.float32
    expected = attention(q, k, v, **options)
    naive = attention(q, k, v, **options, dtype=np.float32)
    judge(out, expected.out, naive.out.astype(q.dtype), dtype, expected.out_noise)
    judge(lse, expected.lse, naive.lse, "float32", expected.lse_noise)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_long_keys(dtype: str, inputs: Any) -> None:
    q, k, v = inputs(3, 131_072 + 77, batch=1, dtype=dtype)
    out = attend(q, k, v, causal=True)
    expected = attention(q, k, v, causal=True)
    naive = attention(q, k, v, causal=True, dtype=np.float32).out.astype(q.dtype)
    judge(out, expected.out, naive, dtype, expected.out_noise)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_schedule_changes_no_bit(dtype: str, inputs: Any) -> None:
    q, k, v = inputs(70, 5000, batch=1, dtype=dtype)
    call = {"causal": True, "return_lse": True}
    out, lse = attend(q, k, v, **call)
    for schedule in (
        {"chunk_size": 512},
        {"budget_ms": 0.1},
        {"num_threads": 1},
        {"max_scratch_bytes": 2**22},
        {"chunk_threshold": 10**6},
    ):
        again, lse_again = attend(q, k, v, **call, **schedule)
        np.testing.assert_array_equal(again.view(np.uint8), out.view(np.uint8), str(schedule))
        np.testing.assert_array_equal(lse_again.view(np.uint8), lse.view(np.uint8))
    row = attend(q[:, :, 30:31], k, v, causal=True, q_offset=5000 - 70 + 30)
    np.testing.assert_array_equal(row.view(np.uint8), out[:, :, 30:31].view(np.uint8))


def test_any_strides_are_read_in_place(inputs: Any) -> None:
    q, k, v = inputs(9, 600)
    out = attend(q, k, v)
    other_order = [
        np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (q, k, v)
    ]
    np.testing.assert_array_equal(attend(*other_order), out)
    spread = [np.zeros((*x.shape[:3], 3 * x.shape[3] + 1), x.dtype) for x in (q, k, v)]
    views = [s[..., 1::3] for s in spread]
    for view, x in zip(views, (q, k, v), strict=True):
        view[...] = x
    np.testing.assert_array_equal(attend(*views), out)
    np.testing.assert_array_equal(attend(*(np.asfortranarray(x) for x in (q, k, v))), out)
    single = [np.concatenate([x, x])[3:2:-1] for x in (q, k, v)]  # one entry, a negative stride
    np.testing.assert_array_equal(attend(*single), out[1:])
    repeated = np.broadcast_to(k[:1], k.shape)
    np.testing.assert_array_equal(attend(q, repeated, v), attend(q, repeated.copy(), v))


def test_read_only_inputs(inputs: Any) -> None:
    arrays = inputs()
    out = attend(*arrays)
    for x in arrays:
        x.flags.writeable = False
    np.testing.assert_array_equal(attend(*arrays), out)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_out_receives_the_result(dtype: str, inputs: Any) -> None:
    q, k, v = inputs(dtype=dtype)
    room = np.full((2, 5, 4, 32), 7, q.dtype)
    out = room.transpose(0, 2, 1, 3)
    assert attend(q, k, v, out=out) is out
    np.testing.assert_array_equal(room.transpose(0, 2, 1, 3), attend(q, k, v))


def test_rows_that_see_nothing(inputs: Any) -> None:
    q, k, v = inputs(4, 2)
    out, lse = attend(q, k, v, causal=True, return_lse=True)
    assert (out[:, :, :2] == 0).all()
    assert (lse[:, :, :2] == -np.inf).all()
    assert np.isfinite(lse[:, :, 2:]).all()


def test_hidden_keys_never_leak(inputs: Any) -> None:
    q, k, v = inputs(6, 900)
    clean = attend(q, k, v, kv_lens=[500, 900])
    k[0, :, 500:], v[0, :, 500:] = np.nan, np.inf
    np.testing.assert_array_equal(attend(q, k, v, kv_lens=[500, 900]), clean)


def test_report_of_this_thread(inputs: Any) -> None:
    q, k, v = inputs(kv_len=5000)
    attend(q, k, v, chunk_size=512, num_threads=1)
    report = keyfold.last_report()
    assert report is not None
    assert report.dispatches >= 10
    assert report.backend == "cpu"
    assert 0 < report.longest_dispatch_ms <= report.elapsed_ms
    assert report.recoveries == 0
