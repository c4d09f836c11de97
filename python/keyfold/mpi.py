"""Attention over keys that are spread over the ranks of an MPI job, by mpi4py."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

try:
    from mpi4py import MPI
except ImportError as error:
    raise ImportError(f"keyfold.mpi needs mpi4py (pip install mpi4py): {error}") from error

from . import _keyfold
from ._arrays import Results, check_tensors, shape_and_dtype
from ._errors import InvalidArgument, PeerError
from ._options import ProgressArgument, Window, integer, native_options, watched
from ._plan import shard_keys, shard_rows
from ._records import ContextParallelReport, Report

__all__ = ["ContextParallel", "ContextParallelReport", "shard_keys", "shard_rows"]

_given_up: list[Any] = []  # what MPI may still write to


class _Operations:
    """What the extension calls: a communicator's non-blocking operations, on memoryviews of bytes.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        A communicator that nobody else uses.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._is_over = MPI.Is_finalized  # at the end of the interpreter modules are empty
        self.rank = comm.Get_rank()
        self.num_ranks = comm.Get_size()

    def all_gather(self, mine: memoryview, everyone: memoryview) -> MPI.Request:
        return self._comm.Iallgather([mine, MPI.BYTE], [everyone, MPI.BYTE])

    def all_reduce_max(self, values: memoryview) -> MPI.Request:
        return self._comm.Iallreduce(MPI.IN_PLACE, [values, MPI.FLOAT], MPI.MAX)

    def all_reduce_sum(self, values: memoryview) -> MPI.Request:
        return self._comm.Iallreduce(MPI.IN_PLACE, [values, MPI.FLOAT], MPI.SUM)

    def reduce_scatter(
        self, values: memoryview, mine: memoryview, counts: list[int]
    ) -> MPI.Request:
        return self._comm.Ireduce_scatter([values, MPI.FLOAT], [mine, MPI.FLOAT], counts, MPI.SUM)

    def broadcast(self, data: memoryview, root: int) -> MPI.Request:
        return self._comm.Ibcast([data, MPI.BYTE], root)

    def send(self, data: memoryview, to: int, tag: int) -> MPI.Request:
        return self._comm.Isend([data, MPI.BYTE], to, tag)

    def receive(self, data: memoryview, source: int, tag: int) -> MPI.Request:
        return self._comm.Irecv([data, MPI.BYTE], source, tag)

    def free(self) -> None:
        if not self._is_over():
            self._comm.Free()


@contextmanager
def _mpi_errors() -> Iterator[None]:
    """Raise MPI's errors as keyfold's."""
    try:
        yield
    except MPI.Exception as error:
        raise PeerError(f"MPI: {error}") from error


def _duplicate(comm: Any, timeout: float) -> MPI.Intracomm:
    if comm == MPI.COMM_NULL or MPI.Is_finalized():
        raise InvalidArgument("comm: expected a communicator between MPI_Init and MPI_Finalize")
    if not isinstance(comm, MPI.Intracomm):
        raise TypeError(f"comm: expected an intracommunicator of mpi4py, got {comm!r}")
    duplicate, joined = comm.Idup()
    end = time.monotonic() + timeout
    while not joined.Test():
        if time.monotonic() > end:
            _given_up.append((duplicate, joined))
            raise PeerError(
                f"not all ranks joined within {timeout} s. End this process: the ranks can't work "
                "together any more"
            )
        time.sleep(1e-4)
    return duplicate


def _is_second(name: str, value: Any, first: str, second: str) -> bool:
    if value not in (first, second):
        raise InvalidArgument(f'{name}: expected "{first}" or "{second}", got {value!r}')
    return bool(value == second)


class ContextParallel:
    """Attention of many ranks, each with a share of the keys ("context parallelism").

    Every method is called by all ranks together, in the same order. After a PeerError for a rank
    that did not answer this object can only be dropped, and what was sent is never received: end
    the process (``MPI.COMM_WORLD.Abort()``), as MPI's own end would wait for that rank.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks. Messages go over a duplicate of it.
    timeout : float, optional
        Longest time to wait for the other ranks to make theirs, in seconds.

    Raises
    ------
    PeerError
        Not all ranks joined within the timeout, or MPI failed.

    Examples
    --------
    >>> import numpy as np, keyfold.mpi
    >>> from mpi4py import MPI
    >>> ranks = keyfold.mpi.ContextParallel(MPI.COMM_SELF)
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((1, 8, 1, 64), np.float32)
    >>> k, v = rng.standard_normal((2, 1, 2, 100_000, 64), np.float32)  # this rank's
    >>> ranks.scaled_dot_product_attention(q, k, v).shape
    (1, 8, 1, 64)
    >>> ranks.last_report.kv_len
    100000
    """

    def __init__(self, comm: MPI.Intracomm, *, timeout: float = 300.0) -> None:
        with _mpi_errors():
            self._ranks = _keyfold.Ranks(_Operations(_duplicate(comm, float(timeout))))
        self._turn = threading.Lock()
        self._last_report: ContextParallelReport | None = None

    @property
    def rank(self) -> int:
        """Which rank this is, from 0."""
        return self._ranks.rank

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return self._ranks.num_ranks

    @property
    def last_report(self) -> ContextParallelReport | None:
        """How the last call that succeeded ran on this rank; None before any has."""
        return self._last_report

    def scaled_dot_product_attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        queries: Literal["replicated", "own"] = "replicated",
        order: Literal["reduce", "ordered"] = "reduce",
        stripe_len: int = 0,
        row_stripe_len: int = 0,
        block_bytes: int = 4 << 20,
        timeout: float = 300.0,
        scale: float | None = None,
        mask: Any = None,
        causal: bool = False,
        q_offset: int | None = None,
        window: Window | None = None,
        softcap: float | None = None,
        sinks: Any = None,
        kv_lens: Sequence[int] | Any = None,
        return_lse: bool = False,
        out: Any = None,
        backend: str | None = None,
        budget_ms: float | None = None,
        chunk_size: int | None = None,
        chunk_threshold: int | None = None,
        max_scratch_bytes: int | None = None,
        num_threads: int | None = None,
        progress: ProgressArgument = None,
    ) -> Any:
        """:func:`keyfold.scaled_dot_product_attention` of `q` over the keys of all ranks.

        Parameters
        ----------
        q : array, [batch, num_heads, q_len, head_dim]
            All queries or this rank's, as `queries` says. All arrays are in host memory.
        k : array, [batch, num_kv_heads, n, head_dim]
            This rank's n >= 0 keys, in ascending order; see :func:`shard_keys`.
        v : array, [batch, num_kv_heads, n, value_dim]
            Their values.
        queries : str, optional
            "replicated": every rank has all rows and gets all results (decode). "own": each rank
            has rows of its own and gets their results (prefill).
        order : str, optional
            "reduce": states come together by reductions, a maximum and sums, exact up to float32
            rounding; the bits depend on the shares and on MPI. "ordered": in the order of the
            keys, with the bits of one process.
        stripe_len : int, optional
            How the keys lie, as in :func:`shard_keys`. 0: contiguous, in any shares of whole
            splits, of which the last that is not empty may have a ragged end.
        row_stripe_len : int, optional
            How the rows lie with "own": as in :func:`shard_rows`, or with 0 one rank's behind the
            other's, in any shares.
        block_bytes : int, optional
            What is computed and sent together, state or keys, about: while one block is on its way
            the next is computed.
        timeout : float, optional
            Longest time to wait for another rank in one go, in seconds: more than a rank takes for
            the dispatches of a block.
        scale, mask, causal, q_offset, window, softcap, sinks, kv_lens
            As in :func:`keyfold.scaled_dot_product_attention`, of the whole sequence: kv_len is
            the sum of the ranks', with "own" q_len too. Of a mask, each rank reads only its keys'
            columns. The same on all ranks, but for the mask's values.
        return_lse, out
            As in :func:`keyfold.scaled_dot_product_attention`, for the rows of `q`.
        backend, budget_ms, chunk_size, chunk_threshold, max_scratch_bytes, num_threads, progress
            As in :func:`keyfold.scaled_dot_product_attention`, for this rank.

        Returns
        -------
        out : array, [batch, num_heads, q_len, value_dim]
            Of the library and dtype of `q`; or `out`.
        lse : array, [batch, num_heads, q_len]
            With `return_lse`: float32, natural logarithm, sinks included.

        Raises
        ------
        InvalidArgument
            A ValueError that names the argument: it is wrong, or ranks disagree about it.
        PeerError
            Another rank failed, or did not answer within `timeout` (and a fifth of it more, to
            find out which); `ranks` says which.
        Exception
            What this rank's own call raises, KeyboardInterrupt included; the other ranks raise
            PeerError. After any exception on any rank, `out` is on all as it was before.

        Notes
        -----
        What is sent, for each row and head: with "reduce" all-reduces of 4 bytes (the maximum) and
        of ``4 * (value_dim + 1)`` bytes (sums), or with "own" reduce-scatters instead of the second
        and an all-gather of `q`. "ordered" sends ``4 * (value_dim + 2)`` bytes from rank to rank
        and from the last to all, which work at the same time as far as there are blocks; or with
        "own" all keys and values to all ranks, which with few rows and many keys is more. Memory:
        three blocks, and a copy of the results.

        References
        ----------
        Context Parallelism for Scalable Million-Token Inference (Yang et al. 2024), Tree Attention
        (Shyam et al. 2024).
        """
        timeout = float(timeout)
        if not self._turn.acquire(blocking=False):
            raise InvalidArgument("ranks: expected one call at a time, got one while another runs")
        with ExitStack() as stack:
            stack.callback(self._turn.release)
            stack.enter_context(_mpi_errors())
            try:
                own_queries = _is_second("queries", queries, "replicated", "own")
                ordered = _is_second("order", order, "reduce", "ordered")
                stripe_len = integer("stripe_len", stripe_len)
                row_stripe_len = integer("row_stripe_len", row_stripe_len)
                block_bytes = integer("block_bytes", block_bytes)
                check_tensors(q=q, k=k, v=v, mask=mask, sinks=sinks)
                options = native_options(
                    scale=scale,
                    mask=mask,
                    causal=causal,
                    q_offset=q_offset,
                    window=window,
                    softcap=softcap,
                    sinks=sinks,
                    kv_lens=kv_lens,
                    backend=backend,
                    budget_ms=budget_ms,
                    chunk_size=chunk_size,
                    chunk_threshold=chunk_threshold,
                    max_scratch_bytes=max_scratch_bytes,
                    num_threads=num_threads,
                )
                shape, dtype = shape_and_dtype(q, "q", None)
                value_shape, _ = shape_and_dtype(v, "v", None)
                shape = (*shape[:-1], *value_shape[-1:])
                results = Results(q, shape, dtype, out=out, with_lse=return_lse)
                callback = stack.enter_context(watched(progress))
            except Exception as error:
                self._ranks.fail(error, timeout)  # raises it, when the others know
            fields = self._ranks.attention(
                q,
                k,
                v,
                results.out,
                results.lse,
                options,
                callback,
                own_queries=own_queries,
                ordered=ordered,
                stripe_len=stripe_len,
                row_stripe_len=row_stripe_len,
                block_bytes=block_bytes,
                timeout=timeout,
            )
        self._last_report = ContextParallelReport(Report(*fields[0]), *fields[1:])
        return results.deliver()
