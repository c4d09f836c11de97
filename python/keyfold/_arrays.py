"""Results as arrays of the caller's own library."""

from __future__ import annotations

import sys
from typing import Any, Callable

import numpy as np

from . import _keyfold
from ._errors import InvalidArgument

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


def new_output(
    like: Any, shape: tuple[int, ...], dtype: str, widen: bool = False
) -> tuple[Any, Callable[[], Any]]:
    """Make memory for a result.

    Parameters
    ----------
    like : array
        An array of the library that the result shall be of.
    shape : tuple of int
        Its shape.
    dtype : str
        The dtype of `like`.
    widen : bool, optional
        Make the result float32 instead.

    Returns
    -------
    memory : array
        Takes the result; dense.
    deliver : callable
        Gives the result as the caller's array, without a copy where its library allows that.
    """
    if isinstance(like, np.ndarray):
        array = np.empty(shape, np.float32 if widen else like.dtype)
        return array, lambda: array
    if _is_tensor(like):
        torch = sys.modules["torch"]
        tensor = torch.empty(shape, dtype=torch.float32 if widen else like.dtype)
        return tensor, lambda: tensor
    dtype = "float32" if widen else dtype
    memory = _keyfold.empty(shape, dtype)
    if hasattr(like, "__array_namespace__"):
        return memory, lambda: like.__array_namespace__().from_dlpack(memory)
    if dtype != "bfloat16":
        return memory, lambda: np.asarray(memory)
    return memory, lambda: memory  # NumPy has no bfloat16: the bare DLPack array
