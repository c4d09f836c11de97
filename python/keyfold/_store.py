"""The keys and values of a conversation in one file that grows, and outlives the process."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, NamedTuple

from . import _keyfold
from ._arrays import check_tensors
from ._errors import InvalidArgument
from ._options import integer
from ._source import AHEAD_BYTES, NUM_THREADS, KeyValueSource

Path = str | os.PathLike[str]


class RecoveryReport(NamedTuple):
    """What was found when a store was opened."""

    closed: bool  # or its writer is at work
    dropped_keys: int  # of an append that was not finished, as far as they had come
    dropped_bytes: int


class VerifyReport(NamedTuple):
    """What :meth:`KvStore.verify` has read."""

    keys: int
    records: int  # checksums: one for each append and block that it reaches into
    bytes: int


def _is_machine(durability: str) -> bool:
    if durability not in ("machine", "process"):
        raise InvalidArgument(f"durability: expected 'machine' or 'process', got {durability!r}")
    return durability == "machine"


class KvStore:
    """Append-only keys and values in one file.

    :meth:`create`, :meth:`append_to` and :meth:`open` give it.

    An append is there with all its keys or not at all: for readers, also in other processes, and
    after the end of the process at any point. One writer at a time, any number of readers beside
    it. A closed store is a safetensors file, with tensors k.0, v.0, k.1, v.1, ... Opening takes
    milliseconds whatever the size.

    Attributes
    ----------
    path : str
        The file.
    shape : tuple of int
        batch, num_kv_heads, head_dim and value_dim.
    dtype : str
        "float32", "float16" or "bfloat16".
    block_len, max_keys : int
        Keys of one block, and the most that the file will hold.
    recovery : RecoveryReport
        What was found when it was opened.

    Examples
    --------
    >>> import numpy as np, keyfold, tempfile
    >>> rng = np.random.default_rng(0)
    >>> path = tempfile.mkdtemp() + "/chat.kv"
    >>> with keyfold.KvStore.create(path, num_kv_heads=2, head_dim=64) as store:
    ...     store.append(*rng.standard_normal((2, 1, 2, 1000, 64), np.float32))
    >>> store = keyfold.KvStore.append_to(path)  # on the next day
    >>> store.append(*rng.standard_normal((2, 1, 2, 1, 64), np.float32))
    >>> len(store)
    1001
    >>> store.source().attend(rng.standard_normal((1, 8, 1, 64), np.float32)).shape
    (1, 8, 1, 64)
    """

    def __init__(self, native: _keyfold.Store) -> None:
        self._store = native
        *shape, self.dtype = native.shape
        self.path = native.path
        self.shape: tuple[int, ...] = tuple(shape)
        self.block_len = native.block_len
        self.max_keys = native.max_keys
        self.recovery = RecoveryReport(*native.recovery)

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        num_kv_heads: int,
        head_dim: int,
        batch: int = 1,
        value_dim: int | None = None,
        dtype: str = "float32",
        block_len: int | None = None,
        max_keys: int = 1 << 24,
        durability: str = "machine",
    ) -> KvStore:
        """Make a new file, for appending.

        Parameters
        ----------
        path : path
            The file; it must not be there.
        num_kv_heads, head_dim, batch, value_dim : int
            Shape of what will be appended; value_dim is head_dim by default.
        dtype : str
            "float32", "float16" or "bfloat16".
        block_len : int, optional
            Keys of one block, a multiple of 512. Default: blocks of about 32 MiB.
        max_keys : int, optional
            Most keys that the file will ever hold.
        durability : {"machine", "process"}, optional
            Whose end an append has survived when it returns. With "process", the machine's end
            takes at most the appends of the last block.

        Raises
        ------
        IoError
            An OSError: the file is there, or can't be written.
        InvalidArgument
            A ValueError that names the argument.
        """
        return cls(
            _keyfold.create_store(
                os.fspath(path),
                integer("batch", batch),
                integer("num_kv_heads", num_kv_heads),
                integer("head_dim", head_dim),
                integer("value_dim", head_dim if value_dim is None else value_dim),
                dtype,
                None if block_len is None else integer("block_len", block_len),
                integer("max_keys", max_keys),
                _is_machine(durability),
            )
        )

    @classmethod
    def append_to(cls, path: Path, *, durability: str = "machine") -> KvStore:
        """Open for appending; what was not finished is dropped, as `recovery` says.

        Parameters
        ----------
        path : path
            The file.
        durability : {"machine", "process"}, optional
            As in :meth:`create`.

        Raises
        ------
        IoError
            An OSError: another writer has it, or it can't be opened.
        InvalidArgument
            A ValueError that names the file and the position where it is damaged.
        """
        return cls(_keyfold.append_to_store(os.fspath(path), _is_machine(durability)))

    @classmethod
    def open(cls, path: Path) -> KvStore:
        """Open for reading; changes nothing. Raises what :meth:`append_to` raises."""
        return cls(_keyfold.open_store(os.fspath(path)))

    @property
    def size(self) -> int:
        """Keys committed by now; those of another writer too."""
        return self._store.size

    def __len__(self) -> int:
        return self.size

    def append(self, k: Any, v: Any) -> None:
        """Append keys and their values.

        Parameters
        ----------
        k : array, [batch, num_kv_heads, n, head_dim]
            The next n >= 0 keys, in host memory.
        v : array, [batch, num_kv_heads, n, value_dim]
            Their values.

        Raises
        ------
        InvalidArgument
            A ValueError that names the argument.
        IoError
            An OSError, on a full disk for instance. The store is as it was, and appending may go
            on, except that after a failed wait for the disk it must be opened anew.
        """
        check_tensors(k=k, v=v)
        self._store.append(k, v)

    def source(
        self, *, ahead_bytes: int = AHEAD_BYTES, num_threads: int = NUM_THREADS
    ) -> KeyValueSource:
        """Give the keys that are there now.

        Parameters
        ----------
        ahead_bytes, num_threads : int, optional
            As in :func:`open_source`.
        """
        return KeyValueSource(
            self._store.source(
                integer("ahead_bytes", ahead_bytes), integer("num_threads", num_threads)
            )
        )

    def follow(
        self,
        *,
        until: int | None = None,
        timeout: float | None = None,
        ahead_bytes: int = AHEAD_BYTES,
        num_threads: int = NUM_THREADS,
    ) -> KeyValueSource:
        """Give all keys, those that another thread or process will append too.

        Parameters
        ----------
        until : int, optional
            End behind this many keys. Default: when the writer closes the store.
        timeout : float, optional
            Longest wait for the next key, in seconds; an IoError ends it.
        ahead_bytes, num_threads : int, optional
            As in :func:`open_source`.
        """
        return KeyValueSource(
            self._store.follow(
                None if until is None else integer("until", until),
                None if timeout is None else float(timeout),
                integer("ahead_bytes", ahead_bytes),
                integer("num_threads", num_threads),
            )
        )

    def verify(self) -> VerifyReport:
        """Read everything and compare all checksums.

        Raises
        ------
        InvalidArgument
            A ValueError that names the first position where one doesn't fit.
        """
        return VerifyReport(*self._store.verify())

    def close(self) -> None:
        """Write everything to disk, and make the file a safetensors file."""
        self._store.close()

    def __enter__(self) -> KvStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
