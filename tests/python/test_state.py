"""AttentionState, merge_state and plan in Python."""

from __future__ import annotations

import gc
import itertools
import threading
from typing import Any

import keyfold
import numpy as np
import pytest
from reference import DTYPES, attention, judge


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_pieces_give_the_bits_of_one_call(dtype: str, inputs: Any, rng: Any) -> None:
    q, k, v = inputs(6, 3000, dtype=dtype, value_dim=24)
    options = {"causal": True, "q_offset": 2500, "softcap": 4.0, "window": (2000, None)}
    out, lse = keyfold.scaled_dot_product_attention(q, k, v, **options, return_lse=True)
    state = keyfold.AttentionState(q, **options)
    for _ in range(2):  # finish() leaves a state that can be used again
        cuts = np.sort(rng.integers(0, 3001, 6))
        for piece_k, piece_v in zip(np.split(k, cuts, 2), np.split(v, cuts, 2), strict=True):
            state.update(piece_k, piece_v)
        assert state.next_key == 3000
        again, lse_again = state.finish(return_lse=True)
        np.testing.assert_array_equal(again.view(np.uint8), out.view(np.uint8))
        np.testing.assert_array_equal(lse_again, lse)
        assert state.next_key == 0


def test_state_without_keys(inputs: Any) -> None:
    q, _, _ = inputs()
    out, lse = keyfold.AttentionState(q).finish(return_lse=True)
    assert out.shape == q.shape
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def test_merged_states(inputs: Any) -> None:
    q, k, v = inputs(6, 4096)
    first, second = keyfold.AttentionState(q), keyfold.AttentionState(q, first_key=2048)
    first.update(k[:, :, :2048], v[:, :, :2048])
    second.update(k[:, :, 2048:], v[:, :, 2048:])
    first.merge(second)
    assert second.next_key == 2048
    expected, naive = attention(q, k, v), attention(q, k, v, dtype=np.float32)
    judge(first.finish(), expected.out, naive.out, "float32", expected.out_noise)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_goes_on_from_a_saved_state(dtype: str, inputs: Any, rng: Any) -> None:
    q, k, v = inputs(6, 3000, dtype=dtype, value_dim=24)
    options = {"causal": True, "q_offset": 2500, "sinks": rng.standard_normal(4, np.float32)}
    out, lse = keyfold.scaled_dot_product_attention(q, k, v, **options, return_lse=True)
    first, second = (keyfold.AttentionState(q, **options) for _ in range(2))
    first.update(k[:, :, :1024], v[:, :, :1024])
    saved = first.save()
    assert [x.shape for x in saved] == [(2, 4, 6), (2, 4, 6), (2, 4, 6, 24)]
    assert all(x.dtype == np.float32 for x in saved)
    second.skip_to(1024)
    second.load(*saved, num_kv_heads=2)
    for state in (first, second):
        assert state.next_key == 1024
        state.update(k[:, :, 1024:], v[:, :, 1024:])
        again, lse_again = state.finish(return_lse=True)
        np.testing.assert_array_equal(again.view(np.uint8), out.view(np.uint8))
        np.testing.assert_array_equal(lse_again, lse)


def test_saved_states_merge_by_the_formula(inputs: Any) -> None:
    q, k, v = inputs(6, 3000)
    numbers = []
    for part in (slice(0, 700), slice(700, 3000)):
        state = keyfold.AttentionState(q)
        state.update(k[:, :, part], v[:, :, part])
        numbers.append(state.save())
    (m_a, l_a, o_a), (m_b, l_b, o_b) = numbers
    m = np.maximum(m_a, m_b)
    a, b = np.exp(m_a - m), np.exp(m_b - m)
    merged = keyfold.AttentionState(q)
    merged.load(m, a * l_a + b * l_b, a[..., None] * o_a + b[..., None] * o_b, num_kv_heads=2)
    out, lse = merged.finish(return_lse=True)
    expected, naive = attention(q, k, v), attention(q, k, v, dtype=np.float32)
    judge(out, expected.out, naive.out, "float32", expected.out_noise)
    judge(lse, expected.lse, naive.lse, "float32", expected.lse_noise)


def test_skipped_keys_are_as_hidden(inputs: Any) -> None:
    q, k, v = inputs(6, 3000)
    state = keyfold.AttentionState(q)
    state.update(k[:, :, :700], v[:, :, :700])
    state.skip_to(2048)
    assert state.next_key == 2048
    state.update(k[:, :, 2048:], v[:, :, 2048:])
    seen = (np.arange(3000) < 700) | (np.arange(3000) >= 2048)
    expected = keyfold.scaled_dot_product_attention(q, k, v, mask=seen)
    np.testing.assert_array_equal(state.finish(), expected)


def test_saved_state_without_keys(inputs: Any) -> None:
    q, k, v = inputs(value_dim=24)
    state = keyfold.AttentionState(q)
    m, sums, o = state.save()
    assert o.shape == q.shape
    assert (m == -np.inf).all()
    assert (sums == 0).all()
    assert (o == 0).all()
    state.update(k, v)
    np.testing.assert_array_equal(state.finish(), keyfold.scaled_dot_product_attention(q, k, v))


def test_wrong_numbers_leave_the_state(inputs: Any) -> None:
    q, k, v = inputs(6, 1000)
    state = keyfold.AttentionState(q)
    state.update(k[:, :, :512], v[:, :, :512])
    m, sums, o = state.save()
    wrongs = {
        "m": (m[..., :5], sums, o, 2),
        "l": (m, sums.astype(np.float16), o, 2),
        "o": (m, sums, o[..., :8], 2),
        "num_kv_heads": (m, sums, o, 4),
    }
    for name, wrong in wrongs.items():
        with pytest.raises(keyfold.InvalidArgument, match=f"^{name}: "):
            state.load(*wrong)
    with pytest.raises(TypeError, match="^m: expected an array"):
        state.load(None, sums, o, 2)
    for key in (0, 513):
        with pytest.raises(keyfold.InvalidArgument, match="^key: "):
            state.skip_to(key)
    with pytest.raises(TypeError, match="^key: "):
        state.skip_to(1024.0)  # type: ignore[arg-type]
    state.update(k[:, :, 512:], v[:, :, 512:])
    state.save()  # which ends inside a split
    with pytest.raises(keyfold.InvalidArgument, match="^k: expected no keys"):
        state.update(k[:, :, :1], v[:, :, :1])
    expected = keyfold.scaled_dot_product_attention(q, k, v)
    np.testing.assert_array_equal(state.finish(), expected)


def test_state_keeps_what_it_borrows(inputs: Any, rng: Any) -> None:
    q, k, v = inputs(6, 1000)
    mask = rng.random((6, 1000)) < 0.5
    expected = keyfold.scaled_dot_product_attention(q, k, v, mask=mask)
    state = keyfold.AttentionState(q.copy(), mask=mask.copy())
    gc.collect()
    scratch = [rng.standard_normal(q.shape) for _ in range(50)]  # would take freed memory
    state.update(k, v)
    np.testing.assert_array_equal(state.finish(), expected)
    del scratch


def test_wrong_update_leaves_the_state(inputs: Any) -> None:
    q, k, v = inputs(6, 1000)
    state = keyfold.AttentionState(q)
    state.update(k[:, :, :100], v[:, :, :100])
    for wrong in (v[..., :8], v[:, :, :5], v.astype(np.float16)):
        with pytest.raises(keyfold.InvalidArgument, match="^v: "):
            state.update(k[:, :, 100:], wrong)
    with pytest.raises(keyfold.InvalidArgument, match="^out: "):
        state.finish(out=np.empty((1, 2, 3, 4), np.float32))
    state.update(k[:, :, 100:], v[:, :, 100:])
    expected = keyfold.scaled_dot_product_attention(q, k, v)
    np.testing.assert_array_equal(state.finish(), expected)


def test_state_serves_one_call_at_a_time(inputs: Any) -> None:
    q, k, v = inputs(6, 5000)
    running, refused = threading.Event(), threading.Event()

    def hold(_: keyfold.Progress) -> None:
        running.set()
        refused.wait(60)

    state = keyfold.AttentionState(q, progress=hold)
    thread = threading.Thread(target=state.update, args=(k, v))
    thread.start()
    running.wait(60)
    with pytest.raises(keyfold.InvalidArgument, match="^state: expected one call at a time"):
        state.update(k, v)
    with pytest.raises(keyfold.InvalidArgument, match="^state: expected one call at a time"):
        keyfold.AttentionState(q).merge(state)
    refused.set()
    thread.join()
    assert state.next_key == 5000
    np.testing.assert_array_equal(state.finish(), keyfold.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("failing", ["update", "skip_to", "save"])
def test_failed_call_ends_a_state(failing: str, inputs: Any) -> None:
    q, k, v = inputs(6, 5000)

    def stop(_: keyfold.Progress) -> None:
        raise ZeroDivisionError

    state = keyfold.AttentionState(q, progress=stop)
    if failing != "update":
        state.update(k[:, :, :100], v[:, :, :100])  # of one split: no dispatch yet
    call = {
        "update": lambda: state.update(k, v),
        "skip_to": lambda: state.skip_to(5120),
        "save": state.save,
    }[failing]
    with pytest.raises(ZeroDivisionError):
        call()
    with pytest.raises(keyfold.InvalidArgument, match="can only be destroyed"):
        state.finish()


def test_state_refuses(inputs: Any) -> None:
    q, _, _ = inputs()
    with pytest.raises(keyfold.InvalidArgument, match="^q_offset: "):
        keyfold.AttentionState(q, causal=True)
    with pytest.raises(keyfold.InvalidArgument, match="^first_key: "):
        keyfold.AttentionState(q, first_key=5)
    with pytest.raises(TypeError, match="^progress: "):
        keyfold.AttentionState(q, progress=3)  # type: ignore[arg-type]
    state = keyfold.AttentionState(q)
    with pytest.raises(keyfold.InvalidArgument, match="^other: "):
        state.merge(state)
    with pytest.raises(TypeError, match="^other: "):
        state.merge(q)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_merge_state(dtype: str, inputs: Any) -> None:
    q, k, v = inputs(6, 1500, dtype=dtype)
    cuts = [0, 300, 1500]
    parts = [
        keyfold.scaled_dot_product_attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True)
        for a, b in itertools.pairwise(cuts)
    ]
    copies = [(out.copy(), lse.copy()) for out, lse in parts]
    out, lse = keyfold.merge_state(*parts[0], *parts[1])
    assert out.dtype == q.dtype
    for (a, b), (c, d) in zip(parts, copies, strict=True):  # the arguments are left alone
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, d)
    expected = attention(q, k, v)
    rounded = [o.astype(np.float64) for o, _ in parts]  # what rounding the parts costs
    weights = [np.exp(part_lse - expected.lse)[..., None] for _, part_lse in parts]
    naive = sum(w * o for w, o in zip(weights, rounded, strict=True))
    judge(out, expected.out, naive, dtype, expected.out_noise)
    naive_lse = attention(q, k, v, dtype=np.float32).lse
    judge(lse, expected.lse, naive_lse, "float32", expected.lse_noise)


def test_merge_with_nothing_is_the_same(inputs: Any) -> None:
    q, k, v = inputs()
    out, lse = keyfold.scaled_dot_product_attention(q, k, v, return_lse=True)
    nothing = np.zeros_like(out), np.full_like(lse, -np.inf)
    for merged in (
        keyfold.merge_state(out, lse, *nothing),
        keyfold.merge_state(*nothing, out, lse),
    ):
        np.testing.assert_array_equal(merged[0], out)
        np.testing.assert_array_equal(merged[1], lse)
    with pytest.raises(keyfold.InvalidArgument, match="^lse_b: "):
        keyfold.merge_state(out, lse, out, lse[:, :, :2])
    with pytest.raises(keyfold.InvalidArgument, match="^out_b: "):
        keyfold.merge_state(out, lse, out.astype(np.float16), lse)


def test_plan() -> None:
    shape = {"q_len": 8192, "kv_len": 8192, "head_dim": 128, "num_heads": 8, "num_kv_heads": 2}
    plan = keyfold.plan(**shape, dtype="float16", causal=True, budget_ms=20)
    assert plan.budget_ms == 20
    assert plan.split_len == 512
    assert all(c.key_begin % plan.split_len == 0 for c in plan.chunks)
    longer = keyfold.plan(**{**shape, "kv_len": 10**6}, dtype="float16", causal=True)
    assert longer.scratch_bytes == plan.scratch_bytes
    with pytest.raises(keyfold.InvalidArgument, match="^num_heads: "):
        keyfold.plan(**{**shape, "num_kv_heads": 3})
    with pytest.raises(keyfold.InvalidArgument, match="^dtype: "):
        keyfold.plan(**shape, dtype="float64")
    with pytest.raises(keyfold.UnsupportedError, match="head_dim"):
        keyfold.plan(**{**shape, "head_dim": 10_000})


def test_devices() -> None:
    devices = keyfold.devices()
    assert devices[0].backend == "cpu"
    assert devices[0].kernel in devices[0].kernels
    assert devices[0].dtypes == ("float32", "float16", "bfloat16")
    assert (devices[0].type, devices[0].driver, devices[0].watchdog) == ("cpu", "", "")
    assert (devices[0].max_shared_bytes, devices[0].subgroup_size) == (0, 0)
