"""What keyfold raises. A thing that is no array at all, or no number, is a plain TypeError."""

from __future__ import annotations

from collections.abc import Iterable


class Error(Exception):
    """Base of all of keyfold's exceptions."""


class InvalidArgument(Error, ValueError):  # noqa: N818 (its name in C++)
    """An argument, option or environment variable is wrong; the message names it."""


class UnsupportedError(Error, NotImplementedError):
    """No backend here can do this (a RuntimeError); the message says what would work."""


class IoError(Error, OSError):
    """A file can't be opened, read or written, or changed while it was in use."""


class OutOfMemoryError(Error, RuntimeError, MemoryError):
    """Host or device memory ran out."""


class DeviceError(Error, RuntimeError):
    """The device failed while it ran a dispatch."""


class PeerError(Error, RuntimeError):
    """Another rank of a :class:`keyfold.mpi.ContextParallel` failed, or does not answer.

    Attributes
    ----------
    ranks : list of int
        Which; empty where that could not be found out.
    """

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = list(ranks)


class InternalError(Error, RuntimeError):
    """A defect in keyfold."""
