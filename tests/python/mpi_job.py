"""What each rank of an MPI job does in test_mpi.py: ``python mpi_job.py SCENARIO SEED``.

A rank for which all went as it should says so; what a rank says else is shown where a test fails.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keyfold
import keyfold.mpi
import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI
from reference import as_numpy, attention, judge, make_inputs

COMM = MPI.COMM_WORLD
RANK, NUM_RANKS = COMM.Get_rank(), COMM.Get_size()
FAULTY = 1
RNG = np.random.default_rng(int(sys.argv[2]))  # the same numbers on all ranks
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@contextmanager
def raises(kind: type[BaseException], start: str, ranks: list[int] | None = None) -> Iterator[None]:
    with pytest.raises(kind, match="^" + re.escape(start)) as caught:
        yield
    if ranks is not None:
        assert isinstance(caught.value, keyfold.PeerError)
        assert caught.value.ranks == ranks


class Shares:
    """A call, and what this rank has of it."""

    def __init__(self, q: Any, k: Any, v: Any, stripe_len: int = 0) -> None:
        self.q, self.k, self.v = q, k, v
        kv_len, q_len = k.shape[2], q.shape[2]
        split = keyfold.plan(q_len=q_len, kv_len=kv_len, head_dim=q.shape[3]).split_len
        self.stripe_len = stripe_len * split
        spans = keyfold.shard_keys(kv_len, NUM_RANKS, RANK, split, self.stripe_len)
        self.mine = np.concatenate([np.arange(0), *(np.arange(*span) for span in spans)])
        self.row_stripe_len = 4 if stripe_len else 0
        if stripe_len:
            spans = keyfold.shard_rows(q_len, NUM_RANKS, RANK, self.row_stripe_len)
        else:  # in halves, and the last rank has none
            spans = [(q_len * RANK // 2, min(q_len, q_len * (RANK + 1) // 2))]
        self.rows = np.concatenate([np.arange(*span) for span in spans])

    def attend(self, ranks: keyfold.mpi.ContextParallel, **options: Any) -> Any:
        """Give its result; `wrap` makes arrays of another library."""
        wrap: Callable[[Any], Any] = options.pop("wrap", lambda array: array)
        q = self.q[:, :, self.rows] if options.get("queries") == "own" else self.q
        k, v = self.k[:, :, self.mine], self.v[:, :, self.mine]
        return ranks.scaled_dot_product_attention(
            wrap(q),
            wrap(k),
            wrap(v),
            stripe_len=self.stripe_len,
            row_stripe_len=self.row_stripe_len,
            num_threads=1,
            **options,
        )


def results() -> None:
    ranks = keyfold.mpi.ContextParallel(COMM)
    assert (ranks.rank, ranks.num_ranks) == (RANK, NUM_RANKS)
    assert ranks.last_report is None
    sinks = RNG.standard_normal(4, np.float32)
    # The scores are so large that nothing but the maximum keeps their exponentials in range.
    options = {"causal": True, "scale": 3.0, "sinks": sinks, "return_lse": True}
    for dtype in DTYPES:
        q, k, v = make_inputs(RNG, 30, 5000, value_dim=20, dtype=dtype)
        one, one_lse = keyfold.scaled_dot_product_attention(q, k, v, **options)
        wide = {name: value for name, value in options.items() if name != "return_lse"}
        right, naive = (attention(q, k, v, **wide, dtype=t) for t in (np.float64, np.float32))
        for stripe_len in (0, 1):
            shares = Shares(q, k, v, stripe_len)
            for queries in ("replicated", "own"):
                rows = shares.rows if queries == "own" else slice(None)
                how = {"queries": queries, "block_bytes": 20_000, **options}
                out, lse = shares.attend(ranks, order="ordered", **how)
                assert out.dtype == q.dtype
                assert np.array_equal(out.view(np.uint8), one[:, :, rows].copy().view(np.uint8))
                assert np.array_equal(lse, one_lse[:, :, rows])
                out = np.empty_like(one[:, :, rows])
                got, lse = shares.attend(ranks, order="reduce", out=out, **how)
                assert got is out
                if not out.size:
                    continue
                judge(out, right.out[:, :, rows], naive.out[:, :, rows], dtype, right.out_noise)
                judge(lse, right.lse[:, :, rows], naive.lse[:, :, rows], "float32", right.lse_noise)
    report = ranks.last_report
    assert report is not None
    assert report.kv_len == 5000
    assert report.report == keyfold.last_report()
    assert report.messages > 3
    assert report.message_bytes > 32
    assert report.waiting_ms >= 0


def tensors() -> None:
    import torch

    ranks = keyfold.mpi.ContextParallel(COMM)
    q, k, v = make_inputs(RNG, 3, 3000)
    one = keyfold.scaled_dot_product_attention(q, k, v)
    out = Shares(q, k, v).attend(ranks, order="ordered", wrap=torch.from_numpy)
    assert isinstance(out, torch.Tensor)
    assert np.array_equal(as_numpy(out).astype(np.float32), one)


def wrong() -> None:
    """Wrong arguments and failures reach all ranks, and the next call works."""
    ranks = keyfold.mpi.ContextParallel(COMM)
    q, k, v = make_inputs(RNG, 40, 3000)
    shares = Shares(q, k, v)
    one = keyfold.scaled_dot_product_attention(q, k, v)
    out = np.full_like(q, 7)
    sinks = RNG.standard_normal(4, np.float32)
    seen = []

    def fail(progress: keyfold.Progress) -> None:
        seen.append(progress)
        if len(seen) == 2:
            raise ZeroDivisionError("out of luck")

    # What is wrong on one rank, what that raises, and what the others are told of it; None: all
    # raise the same.
    cases: list[tuple[dict[str, Any], type[Exception], str, str | None]] = [
        ({"softcap": 2.0}, keyfold.InvalidArgument, "softcap: expected the same", None),
        ({"sinks": sinks[:3]}, keyfold.InvalidArgument, "sinks: expected the same", None),
        ({"scale": "a"}, TypeError, "scale: expected a number", "TypeError: scale: "),
        ({"queries": "none"}, keyfold.InvalidArgument, "queries: expected ", "InvalidArgument: "),
        ({"wrap": lambda _: None}, TypeError, "q: expected an array", "TypeError: q: "),
        ({"progress": 3}, TypeError, "progress: expected ", "TypeError: progress: "),
        ({"out": out[:, :, :3]}, keyfold.InvalidArgument, "out: ", "out: "),
        ({"out": 3}, TypeError, "out: expected an array", "out: expected an array"),
        ({"progress": fail}, ZeroDivisionError, "out of luck", "ZeroDivisionError: out of luck"),
    ]
    for options, kind, message, told in cases:
        for order in ("reduce", "ordered"):
            seen.clear()
            how = {"out": out, "order": order, "block_bytes": 3000, "sinks": sinks}
            if RANK == FAULTY:
                how.update(options)
            if RANK == FAULTY or told is None:
                with raises(kind, message):
                    shares.attend(ranks, **how)
            else:
                with raises(keyfold.PeerError, f"rank {FAULTY} failed: {told}", [FAULTY]):
                    shares.attend(ranks, **how)
            assert (out == 7).all()
            assert np.array_equal(shares.attend(ranks, order="ordered"), one)


def _abandoned(ranks: keyfold.mpi.ContextParallel, order: str, timeout: float) -> None:
    """A call in which the faulty rank goes on no more."""
    q, k, v = make_inputs(RNG, 64, 4096)
    seen = []

    def hang(progress: keyfold.Progress) -> None:
        seen.append(progress)
        if len(seen) == 2:
            time.sleep(12)
            os._exit(0)

    Shares(q, k, v).attend(
        ranks,
        order=order,
        timeout=timeout,
        block_bytes=20_000,
        progress=hang if RANK == FAULTY else None,
    )


def hang(order: str) -> None:
    ranks = keyfold.mpi.ContextParallel(COMM)
    start = time.monotonic()
    with raises(keyfold.PeerError, f"rank {RANK} waited for 2 s", [FAULTY]):
        _abandoned(ranks, order, timeout=2)
    assert time.monotonic() - start < 9  # 2 s, and 1 s for signs of life
    with raises(keyfold.InvalidArgument, "ranks: expected ranks that can work together"):
        _abandoned(ranks, order, timeout=2)


def interrupt() -> None:
    """Ctrl-C while a rank waits for another."""
    ranks = keyfold.mpi.ContextParallel(COMM)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if RANK != FAULTY:
        threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with raises(KeyboardInterrupt, ""):
        _abandoned(ranks, "reduce", timeout=60)
    assert time.monotonic() - start < 9


def join() -> None:
    """A rank that makes no ContextParallel."""
    if RANK == FAULTY:
        time.sleep(12)
        os._exit(0)
    with raises(keyfold.PeerError, "not all ranks joined within 2", []):
        keyfold.mpi.ContextParallel(COMM, timeout=2)


def alone() -> None:
    """Without mpirun, and what needs no other rank."""
    q, k, v = make_inputs(RNG, 3, 3000)
    one = keyfold.scaled_dot_product_attention(q, k, v)
    for _ in range(3000):  # more than there are communicators at a time
        ranks = keyfold.mpi.ContextParallel(MPI.COMM_SELF)
    assert (ranks.rank, ranks.num_ranks) == (0, 1)
    for order in ("reduce", "ordered"):
        for queries in ("replicated", "own"):
            out = ranks.scaled_dot_product_attention(q, k, v, order=order, queries=queries)
            assert np.array_equal(out, one)

    def again(_: keyfold.Progress) -> None:
        with raises(keyfold.InvalidArgument, "ranks: expected one call at a time"):
            ranks.scaled_dot_product_attention(q, k, v)

    ranks.scaled_dot_product_attention(q, k, v, progress=again)
    with raises(TypeError, "comm: expected an intracommunicator of mpi4py, got 3"):
        keyfold.mpi.ContextParallel(3)  # type: ignore[arg-type]
    with raises(keyfold.InvalidArgument, "comm: expected a communicator"):
        keyfold.mpi.ContextParallel(MPI.COMM_NULL)
    with raises(keyfold.InvalidArgument, "timeout_seconds: expected a number above 0, got -1"):
        ranks.scaled_dot_product_attention(q, k, v, timeout=-1)
    tensor_free = ranks.scaled_dot_product_attention(q, k[:, :, :0], v[:, :, :0])
    assert (tensor_free == 0).all()


def say(text: str) -> None:
    os.write(1, f"rank {RANK}: {text}\n".encode())  # at once


SCENARIOS: dict[str, Callable[[], None]] = {
    "results": results,
    "tensors": tensors,
    "wrong": wrong,
    "hang-reduce": lambda: hang("reduce"),
    "hang-ordered": lambda: hang("ordered"),
    "interrupt": interrupt,
    "join": join,
    "alone": alone,
}

if __name__ == "__main__":
    name = sys.argv[1]
    try:
        SCENARIOS[name]()
    except BaseException:
        import traceback

        say(traceback.format_exc())
        COMM.Abort(1)
    say("as it should")
    if name in ("hang-reduce", "hang-ordered", "interrupt", "join"):
        time.sleep(3)  # so that no rank ends the job before the others have spoken
        os._exit(0)  # MPI's end would wait for the ranks that are gone
