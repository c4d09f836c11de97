"""Results as arrays of the caller's own library."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import _keyfold
from ._devices import is_on_cuda
from ._errors import InvalidArgument


class Output(NamedTuple):
    """Memory that takes a result, and the result as the caller's array."""

    memory: Any
    deliver: Callable[[], Any]


_IMMUTABLE = ("jax", "jaxlib", "mlx")


def _library(array: Any) -> str:
    return type(array).__module__.partition(".")[0]


def _is_tensor(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def check_writable(array: Any, name: str) -> None:
    """Refuse arrays whose library takes their contents as constant, though DLPack shares them."""
    if _library(array) in _IMMUTABLE:
        raise InvalidArgument(
            f"{name}: expected an array that can be written, got one of "
            f"{type(array).__module__}, which are constant; use the result that is returned"
        )


def check_no_gradient(**arrays: Any) -> None:
    """Refuse PyTorch tensors whose gradient would silently be lost."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return
    for name, array in arrays.items():
        if isinstance(array, torch.Tensor) and array.requires_grad:
            raise InvalidArgument(
                f"{name}: expected a tensor that requires no gradient, as keyfold has no backward "
                f"pass yet; call it under torch.no_grad(), or pass {name}.detach()"
            )


def check_tensors(**arrays: Any) -> None:
    """Refuse PyTorch tensors of which DLPack does not tell all: gradients and negation."""
    check_no_gradient(**arrays)
    for name, array in arrays.items():
        if _is_tensor(array) and array.is_neg():
            raise InvalidArgument(
                f"{name}: expected a tensor that holds its own values, got a negated view; pass "
                f"{name}.resolve_neg()"
            )


def _new_on_cuda(like: Any, shape: tuple[int, ...], widen: bool) -> Any:
    """Make memory on the device of `like` by its library, by the array API standard."""
    if _library(like) == "cupy":
        cupy = sys.modules["cupy"]
        with like.device:
            return cupy.empty(shape, cupy.float32 if widen else like.dtype)
    if _library(like) in _IMMUTABLE or not hasattr(like, "__array_namespace__"):
        raise InvalidArgument(
            f"out: expected an array for the result, as one of {type(like).__module__} can't be "
            "made on its device and then written; pass out= of a library whose arrays can"
        )
    library = like.__array_namespace__()
    return library.empty(shape, dtype=library.float32 if widen else like.dtype, device=like.device)


def new(like: Any, shape: tuple[int, ...], dtype: str, widen: bool = False) -> Output:
    """Make dense memory for a result of the library of `like`, whose dtype is `dtype`.

    With `widen` the result is float32 instead.
    """
    if isinstance(like, np.ndarray):
        array = np.empty(shape, np.float32 if widen else like.dtype)
        return Output(array, lambda: array)
    if _is_tensor(like):
        torch = sys.modules["torch"]
        dtype_of = torch.float32 if widen else like.dtype
        tensor = torch.empty(shape, dtype=dtype_of, device=like.device)
        return Output(tensor, lambda: tensor)
    if is_on_cuda(like):
        array = _new_on_cuda(like, shape, widen)
        return Output(array, lambda: array)
    dtype = "float32" if widen else dtype
    memory = _keyfold.empty(shape, dtype)
    if hasattr(like, "__array_namespace__"):
        return Output(memory, lambda: like.__array_namespace__().from_dlpack(memory))
    if dtype != "bfloat16":
        return Output(memory, lambda: np.asarray(memory))
    return Output(memory, lambda: memory)  # NumPy has no bfloat16: the bare DLPack array


def shape_and_dtype(array: Any, name: str, stream: int | None) -> tuple[tuple[int, ...], str]:
    """Give an array's shape, and the name of its dtype; without DLPack where that takes less."""
    if _is_tensor(array):
        dtype = str(array.dtype).removeprefix("torch.")
        if dtype in ("float32", "float16", "bfloat16"):
            return tuple(array.shape), dtype
    return _keyfold.shape_and_dtype(array, name, stream)


class Results:
    """Memory for an output [batch, num_heads, q_len, value_dim] and its logsumexp.

    Parameters
    ----------
    like : array
        An array of the library that the results shall be of.
    shape : tuple of int
        Shape of the output.
    dtype : str
        The dtype of `like`.
    out : array, optional
        The caller's own array for the output.
    with_lse : bool, optional
        Make memory for the logsumexp too.
    """

    def __init__(
        self,
        like: Any,
        shape: tuple[int, ...],
        dtype: str,
        *,
        out: Any = None,
        with_lse: bool = False,
    ) -> None:
        if out is not None:
            check_writable(out, "out")
        self._out = new(like, shape, dtype) if out is None else Output(out, lambda: out)
        self._lse = new(like, shape[:-1], dtype, widen=True) if with_lse else None

    @property
    def out(self) -> Any:
        """What takes the output."""
        return self._out.memory

    @property
    def lse(self) -> Any:
        """What takes the logsumexp, or None."""
        return self._lse.memory if self._lse else None

    def deliver(self) -> Any:
        """Out, or out and lse, as the caller's arrays; no copy where their library allows that."""
        out = self._out.deliver()
        return (out, self._lse.deliver()) if self._lse else out
