"""Wrong arguments end in an exception that names them; nothing is written, nothing crashes."""

from __future__ import annotations

import pickle
from typing import Any

import keyfold
import numpy as np
import pytest
from capsules import HandMade, ones, with_byte_offset

attend = keyfold.scaled_dot_product_attention


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("scale", "x", TypeError),
        ("scale", [1, 2], TypeError),
        ("scale", 1e300, ValueError),
        ("scale", float("nan"), ValueError),
        ("mask", [[True]], TypeError),
        ("mask", np.ones((1, 1, 1, 1, 1), bool), ValueError),
        ("mask", np.ones(5, bool), ValueError),
        ("mask", np.ones((5, 700), np.int64), ValueError),
        ("mask", np.ones((5, 700), np.float64), ValueError),
        ("q_offset", 1.5, TypeError),
        ("q_offset", 2**80, ValueError),
        ("q_offset", 2**62, ValueError),
        ("window", 3, TypeError),
        ("window", (1, 2, 3), TypeError),
        ("window", (-1, None), ValueError),
        ("softcap", 0, ValueError),
        ("sinks", ones(3), ValueError),
        ("sinks", ones(4, 1), ValueError),
        ("sinks", 1.0, TypeError),
        ("kv_lens", 7, TypeError),
        ("kv_lens", [1], ValueError),
        ("kv_lens", [1, 701], ValueError),
        ("kv_lens", [1, 1.5], TypeError),
        ("out", [1], TypeError),
        ("out", ones(2, 4, 5, 31), ValueError),
        ("out", ones(2, 4, 5, 32).astype(np.float16), ValueError),
        ("out", np.broadcast_to(ones(32), (2, 4, 5, 32)), ValueError),
        ("backend", "abacus", ValueError),
        ("backend", 3, TypeError),
        ("budget_ms", 0, ValueError),
        ("budget_ms", "soon", TypeError),
        ("chunk_size", 0, ValueError),
        ("chunk_size", 1.0, TypeError),
        ("chunk_threshold", -1, ValueError),
        ("max_scratch_bytes", 10, ValueError),
        ("num_threads", 0, ValueError),
        ("num_threads", 2**40, ValueError),
        ("progress", 3, TypeError),
    ],
)
def test_options(name: str, value: Any, error: type[Exception], inputs: Any) -> None:
    out = np.full((2, 4, 5, 32), 7, np.float32)
    with pytest.raises(error, match=f"^{name}[.:]") as caught:
        attend(*inputs(), **{"out": out, name: value})
    assert isinstance(caught.value, keyfold.InvalidArgument) == (error is ValueError)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ([[1.0]], TypeError),
        ("q", TypeError),
        (None, TypeError),
        (3.0, TypeError),
        (ones(2, 5, 32), ValueError),
        (ones(2, 4, 5, 32).astype(np.float64), ValueError),
        (ones(2, 4, 5, 32).astype(">f4"), ValueError),
        (ones(2, 4, 5, 32).astype(object), ValueError),
        (ones(2, 4, 5, 32) > 0, ValueError),
        (ones(2, 4, 5, 32)[..., ::-1], ValueError),
        (ones(2, 4, 5, 577), (ValueError, RuntimeError)),
        (HandMade(ones(2, 4, 5, 32), device_type=2), ValueError),
        (HandMade(ones(2, 4, 5, 32), ndim=-1), (TypeError, ValueError)),
        (HandMade(ones(2, 4, 5, 32), lanes=4), ValueError),
        (HandMade(ones(2, 4, 5, 32), shape=(2, 4, -5, 32)), ValueError),
        (HandMade(ones(2, 4, 5, 32), data=None), ValueError),
    ],
)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_arrays(name: str, value: Any, error: Any, inputs: Any) -> None:
    q, k, v = inputs(5, 5, heads=4, kv_heads=4)
    arrays = {"q": q, "k": k, "v": v}
    arrays[name] = value
    with pytest.raises(error):
        attend(**arrays)


def test_shapes_that_do_not_fit(inputs: Any) -> None:
    q, k, v = inputs()
    with pytest.raises(keyfold.InvalidArgument, match="^q: expected sizes"):
        attend(q[:, :, :0], k, v)
    for name, arrays in {
        "k": (q, k[..., :31], v),
        "v": (q, k, v[:, :, :9]),
        "num_heads": (q[:, :3], k, v),
    }.items():
        with pytest.raises(keyfold.InvalidArgument, match=f"^{name}: expected .*, got "):
            attend(*arrays)
    with pytest.raises(keyfold.InvalidArgument, match="^v: expected dtype float32, got float16"):
        attend(q, k, v.astype(np.float16))


def test_byte_offset_of_a_capsule(inputs: Any) -> None:
    q, k, v = inputs()
    expected = attend(q, k, v)
    np.testing.assert_array_equal(attend(q, with_byte_offset(k, 64), v), expected)
    strided = np.zeros((*k.shape[:3], 64), np.float32)[..., ::2]
    strided[...] = k
    np.testing.assert_array_equal(attend(q, with_byte_offset(strided, 8), v), expected)
    with pytest.raises(keyfold.InvalidArgument, match="^k: expected data aligned to 4 bytes"):
        attend(q, HandMade(strided, byte_offset=2), v)


def test_read_only_out(inputs: Any) -> None:
    out = np.full((2, 4, 5, 32), 7, np.float32)
    out.flags.writeable = False
    with pytest.raises(keyfold.InvalidArgument, match="^out: expected a writable array"):
        attend(*inputs(), out=out)
    assert (out == 7).all()
    half = out.astype(np.float16)
    half.flags.writeable = False
    with pytest.raises(keyfold.InvalidArgument, match="^out: expected a writable array"):
        attend(*inputs(dtype="float16"), out=half)


def test_wrong_environment(inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYFOLD_CHUNK_SIZE", "many")
    with pytest.raises(keyfold.InvalidArgument, match="^KEYFOLD_CHUNK_SIZE: .*many"):
        attend(*inputs())


def test_progress_that_raises(inputs: Any) -> None:
    out = np.full((2, 4, 5, 32), 7, np.float32)

    def stop(at: keyfold.Progress) -> None:
        raise LookupError(at.dispatches)

    with pytest.raises(LookupError, match="1"):
        attend(*inputs(), out=out, progress=stop)
    assert (out == 7).all()


def test_exceptions_are_what_python_users_expect() -> None:
    assert issubclass(keyfold.InvalidArgument, ValueError)
    for error in (keyfold.UnsupportedError, keyfold.OutOfMemoryError, keyfold.DeviceError):
        assert issubclass(error, RuntimeError)
    assert issubclass(keyfold.OutOfMemoryError, MemoryError)
    error = pickle.loads(pickle.dumps(keyfold.InvalidArgument("q: expected")))
    assert isinstance(error, keyfold.Error)
    assert str(error) == "q: expected"
