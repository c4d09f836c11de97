"""Arrays on CUDA devices: which are, and the stream on which to use them."""

from __future__ import annotations

import sys
from typing import Any

from ._errors import InvalidArgument

_CUDA = (2, 13)  # kDLCUDA and kDLCUDAManaged


def is_on_cuda(array: Any) -> bool:
    """Whether an array is in the memory of a CUDA device."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return bool(array.is_cuda)
    ask = getattr(array, "__dlpack_device__", None)
    return ask is not None and ask()[0] in _CUDA


def stream_of(array: Any, stream: Any = None) -> int | None:
    """Give the stream of a call, as a number; None where `array` is not on a CUDA device.

    Parameters
    ----------
    array : array
        The queries.
    stream : int or object, optional
        What the caller asked for: a number, or an object that has one, as the streams of PyTorch,
        CuPy and cuda-python do. Default: the current stream of the array's library, else the
        device's default stream.
    """
    if not is_on_cuda(array):
        if stream is not None:
            raise InvalidArgument("stream: expected arrays on a CUDA device, whose stream it is")
        return None
    return _current_stream(array) if stream is None else _number(stream)


def _number(stream: Any) -> int:
    if isinstance(stream, int) and not isinstance(stream, bool):
        if stream < 0:
            raise InvalidArgument(f"stream: expected a stream's address, got {stream}")
        return stream
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1])
    for name in ("cuda_stream", "ptr"):  # PyTorch, CuPy
        if hasattr(stream, name):
            return int(getattr(stream, name))
    raise TypeError(f"stream: expected a number or a CUDA stream, got {stream!r}")


def _current_stream(array: Any) -> int:
    library = type(array).__module__.partition(".")[0]
    if library == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # a tenth of the time
        if raw is not None:
            return int(raw(array.get_device()))
        return int(torch.cuda.current_stream(array.device).cuda_stream)
    return 0
