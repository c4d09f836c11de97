"""Keyword arguments as the extension's options, and progress in its forms."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

from . import _keyfold
from ._devices import is_on_cuda
from ._errors import InvalidArgument
from ._records import Progress

Window = tuple[int | None, int | None]
ProgressArgument = bool | Callable[[Progress], object] | None


def integer(name: str, value: Any) -> int:
    """An integer of 64 bits, from anything that is an integer to Python."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
    if not -(2**63) <= number < 2**63:
        raise InvalidArgument(f"{name}: expected an integer of 64 bits, got {number}")
    return number


def _optional_integer(name: str, value: Any) -> int | None:
    return None if value is None else integer(name, value)


def _optional_number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, Real) or hasattr(value, "__float__"):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass  # an array of many, an integer beyond all floats
    raise TypeError(f"{name}: expected a number, got {value!r}")


def _lengths(value: Any) -> list[int]:
    if value is None:
        return []
    try:
        items = list(value.tolist() if hasattr(value, "tolist") else value)
    except TypeError:
        raise TypeError(f"kv_lens: expected a sequence of integers, got {value!r}") from None
    return [integer("kv_lens", item) for item in items]


def _sides(window: Any) -> Window:
    if window is None:
        return None, None
    if not isinstance(window, Sequence) or isinstance(window, str) or len(window) != 2:
        raise TypeError(f"window: expected a pair (left, right), got {window!r}")
    left, right = window
    return _optional_integer("window", left), _optional_integer("window", right)


def native_options(
    *,
    scale: Any = None,
    mask: Any = None,
    causal: Any = False,
    q_offset: Any = None,
    window: Any = None,
    softcap: Any = None,
    sinks: Any = None,
    kv_lens: Any = None,
    stream: int | None = None,
    backend: Any = None,
    budget_ms: Any = None,
    chunk_size: Any = None,
    chunk_threshold: Any = None,
    max_scratch_bytes: Any = None,
    num_threads: Any = None,
) -> _keyfold.Options:
    """Convert the options that all calls share; the library checks their values."""
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: expected a name, got {backend!r}")
    left, right = _sides(window)
    on_device = stream is not None and is_on_cuda(kv_lens)
    return _keyfold.Options(
        scale=_optional_number("scale", scale),
        mask=mask,
        causal=bool(causal),
        q_offset=_optional_integer("q_offset", q_offset),
        window_left=left,
        window_right=right,
        softcap=_optional_number("softcap", softcap),
        sinks=sinks,
        kv_lens=[] if on_device else _lengths(kv_lens),
        device_kv_lens=kv_lens if on_device else None,
        stream=stream,
        backend=backend,
        budget_ms=_optional_number("budget_ms", budget_ms),
        chunk_size=_optional_integer("chunk_size", chunk_size),
        chunk_threshold=_optional_integer("chunk_threshold", chunk_threshold),
        max_scratch_bytes=_optional_integer("max_scratch_bytes", max_scratch_bytes),
        num_threads=_optional_integer("num_threads", num_threads),
    )


def callback_of(progress: Any) -> Callable[..., object] | None:
    """Adapt a callable to what the extension calls."""
    if progress is None:
        return None
    if not callable(progress):
        raise TypeError(f"progress: expected True or a callable, got {progress!r}")
    return lambda *fields: progress(Progress(*fields))


@contextmanager
def watched(progress: Any) -> Iterator[Callable[..., object] | None]:
    """Adapt `progress`; a bar closes when the call ends."""
    if progress is None or progress is False:
        yield None
    elif progress is True:
        from tqdm.auto import tqdm

        form = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        with tqdm(total=1.0, desc="attention", bar_format=form) as bar:

            def show(at: Progress) -> None:
                text = f"{at.dispatches} dispatches, longest {at.longest_dispatch_ms:.0f} ms"
                bar.set_postfix_str(text, refresh=False)
                bar.update(at.fraction - bar.n)

            yield callback_of(show)
    else:
        yield callback_of(progress)
