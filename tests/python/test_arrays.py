"""Arrays of NumPy, PyTorch, MLX and JAX: the same bits, the caller's own type, no copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keyfold
import ml_dtypes
import numpy as np
import pytest

attend = keyfold.scaled_dot_product_attention


def library(name: str) -> tuple[Callable[[Any], Any], Callable[[Any], Any], type]:
    """Give the conversions from and to NumPy, and the array type, of a library."""
    if name == "torch":
        torch = pytest.importorskip("torch")

        def from_numpy(x: Any) -> Any:
            bits = torch.from_numpy(x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x)
            return bits.view(torch.bfloat16) if x.dtype == ml_dtypes.bfloat16 else bits

        return from_numpy, lambda x: x.float().numpy(), torch.Tensor
    if name == "mlx":
        mx = pytest.importorskip("mlx.core")

        def from_wide(x: Any) -> Any:
            bfloat16 = x.dtype == ml_dtypes.bfloat16
            return mx.array(x.astype(np.float32)).astype(mx.bfloat16) if bfloat16 else mx.array(x)

        return from_wide, lambda x: np.asarray(x.astype(mx.float32)), mx.array
    jax = pytest.importorskip("jax")
    return jax.numpy.asarray, lambda x: np.asarray(x).astype(np.float32), jax.Array


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["torch", "mlx", "jax"])
def test_the_callers_own_arrays(name: str, dtype: str, inputs: Any, rng: Any) -> None:
    from_numpy, to_numpy, array_type = library(name)
    arrays = inputs(dtype=dtype)
    mask = rng.random((5, 700)) < 0.5
    sinks = rng.standard_normal(4, np.float32)
    expected, expected_lse = attend(*arrays, mask=mask, sinks=sinks, return_lse=True)
    theirs = [from_numpy(x) for x in arrays]
    call = {"mask": from_numpy(mask), "sinks": from_numpy(sinks), "return_lse": True}
    out, lse = attend(*theirs, **call)
    assert isinstance(out, array_type)
    assert isinstance(lse, array_type)
    assert dtype in str(out.dtype)
    assert "float32" in str(lse.dtype)
    np.testing.assert_array_equal(to_numpy(out), expected.astype(np.float32))
    np.testing.assert_array_equal(to_numpy(lse), expected_lse)

    state = keyfold.AttentionState(theirs[0], mask=call["mask"], sinks=call["sinks"])
    state.update(*theirs[1:])
    again = state.finish()
    assert isinstance(again, array_type)
    np.testing.assert_array_equal(to_numpy(again), expected.astype(np.float32))

    merged, _ = keyfold.merge_state(out, lse, out, lse)
    assert isinstance(merged, array_type)
    # Libraries may be mixed; the result follows q.
    assert isinstance(attend(theirs[0], *arrays[1:]), array_type)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_keys_are_not_copied(name: str, inputs: Any) -> None:
    q, k, v = inputs(batch=1)
    many = 2**40  # no copy of these fits anywhere; a stride of 0 repeats one key
    if name == "numpy":
        k, v = (np.broadcast_to(x[:, :, :1], (1, 2, many, 32)) for x in (k, v))
    else:
        from_numpy, _, _ = library(name)
        q, k, v = (from_numpy(x) for x in (q, k, v))
        k, v = (x[:, :, :1].expand(1, 2, many, 32) for x in (k, v))
    out = attend(q, k, v, kv_lens=[600], chunk_threshold=many + 1)
    rows = np.repeat(np.asarray(v[:, :, :1]), 2, axis=1)
    np.testing.assert_allclose(np.asarray(out), np.broadcast_to(rows, out.shape), rtol=1e-5)


def test_torch_out(inputs: Any) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in inputs())
    out = torch.full((2, 5, 4, 32), 7.0).transpose(1, 2)
    assert attend(q, k, v, out=out) is out
    assert torch.equal(out, attend(q, k, v))


@pytest.mark.parametrize("name", ["mlx", "jax"])
def test_constant_arrays_are_not_written(name: str, inputs: Any) -> None:
    from_numpy, to_numpy, _ = library(name)
    q, k, v = (from_numpy(x) for x in inputs())
    out = from_numpy(np.full((2, 4, 5, 32), 7, np.float32))
    with pytest.raises(keyfold.InvalidArgument, match="^out: .*constant"):
        attend(q, k, v, out=out)
    assert (to_numpy(out) == 7).all()


def test_torch_gradients_are_not_lost_silently(inputs: Any) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in inputs())
    k.requires_grad_()
    with pytest.raises(keyfold.InvalidArgument, match="^k: .*gradient"):
        attend(q, k, v)
    with torch.no_grad():
        expected = attend(q, k, v)
    assert torch.equal(attend(q, k.detach(), v), expected)
    assert not expected.requires_grad


def test_negated_views_of_torch() -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(1, 2, 3, 4, dtype=torch.cfloat).conj().imag
    assert x.is_neg()
    with pytest.raises(keyfold.InvalidArgument, match="^v: .*resolve_neg"):
        attend(x.resolve_neg(), x.resolve_neg(), x)


def test_tensor_on_another_device() -> None:
    torch = pytest.importorskip("torch")
    q = torch.empty(1, 1, 1, 8, device="meta")
    with pytest.raises(keyfold.InvalidArgument, match="^q: .*meta"):
        attend(q, q, q)
