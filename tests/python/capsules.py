"""DLPack capsules made by hand, with what no real library would put into them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class HandMade:
    """Hands over an array's memory, with some fields of the DLPack tensor replaced."""

    def __init__(self, array: npt.NDArray[Any], **fields: Any) -> None:
        axes = ctypes.c_int64 * max(array.ndim, 1)
        self._array = array
        self._shape = axes(*fields.pop("shape", array.shape))
        self._strides = axes(*(s // array.itemsize for s in array.strides))
        self._tensor = _Tensor(
            data=array.ctypes.data,
            device_type=1,
            ndim=array.ndim,
            code=2,
            bits=8 * array.itemsize,
            lanes=1,
            shape=self._shape,
            strides=self._strides,
        )
        for name, value in fields.items():
            setattr(self._tensor, name, value)

    def __dlpack__(self, **_: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self._tensor), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self._tensor.device_type, self._tensor.device_id)


def with_byte_offset(array: npt.NDArray[Any], offset: int) -> HandMade:
    """The same elements, as data that starts `offset` bytes earlier."""
    return HandMade(array, data=array.ctypes.data - offset, byte_offset=offset)


def ones(*shape: int) -> npt.NDArray[np.float32]:
    return np.ones(shape, np.float32)
