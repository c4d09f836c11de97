"""Threads, signals, processes, and arrays whose owners let go of them."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keyfold
import numpy as np
import pytest

attend = keyfold.scaled_dot_product_attention


def test_sixteen_threads_at_once(inputs: Any) -> None:
    q, k, v = inputs(40, 3000)
    expected = attend(q, k, v)
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda _: attend(q, k, v, budget_ms=1), range(64)))
    assert all(np.array_equal(result, expected) for result in results)


def test_arrays_freed_while_a_call_runs(inputs: Any, rng: Any) -> None:
    arrays = list(inputs(40, 5000))
    expected = attend(*arrays)
    running, freed = threading.Event(), threading.Event()
    results: list[Any] = []

    def hold(_: keyfold.Progress) -> None:
        running.set()
        freed.wait(60)

    def run() -> None:
        results.append(attend(arrays.pop(0), arrays.pop(0), arrays.pop(0), progress=hold))

    thread = threading.Thread(target=run)
    thread.start()
    running.wait(60)
    assert not arrays
    gc.collect()
    taken = [rng.standard_normal((2, 2, 5000, 32), np.float32) for _ in range(8)]
    freed.set()
    thread.join()
    np.testing.assert_array_equal(results[0], expected)
    del taken


def test_mapped_file_stays_open_while_a_call_runs(inputs: Any, tmp_path: Path) -> None:
    q, k, v = inputs(4, 3000, batch=1)
    path = tmp_path / "keys"
    path.write_bytes(k.tobytes())
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    refused = []

    def close(_: keyfold.Progress) -> None:
        with pytest.raises(BufferError):
            mapping.close()
        refused.append(True)

    mapped = np.frombuffer(mapping, np.float32).reshape(k.shape)
    np.testing.assert_array_equal(attend(q, mapped, v, progress=close), attend(q, k, v))
    assert refused
    del mapped
    mapping.close()


def test_gil_is_released(inputs: Any) -> None:
    q, k, v = inputs(400, 20_000)
    count, stop = 0, threading.Event()

    def counter() -> None:
        nonlocal count
        while not stop.is_set():
            count += 1
            time.sleep(0.001)

    thread = threading.Thread(target=counter)
    thread.start()
    attend(q, k, v, chunk_threshold=10**6)  # one dispatch: nothing hands the GIL over between
    seen = count
    stop.set()
    thread.join()
    assert seen > 10


@pytest.mark.usefixtures("heeds_sigint")
def test_ctrl_c(inputs: Any) -> None:
    q, k, v = inputs(4000, 400_000, batch=1)  # minutes of work
    out = np.full(q.shape, 7, np.float32)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        attend(q, k, v, out=out, budget_ms=50)
    timer.join()
    assert (out == 7).all()


def test_progress_reaches_the_end(inputs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    q, k, v = inputs(40, 5000)
    seen: list[keyfold.Progress] = []
    attend(q, k, v, chunk_size=512, progress=seen.append)
    assert [p.dispatches for p in seen] == list(range(1, len(seen) + 1))
    assert len(seen) >= 10
    assert seen[-1].fraction == pytest.approx(1)
    attend(q, k, v, chunk_size=512, progress=True)
    assert "100%" in capsys.readouterr().err


def run_python(code: str) -> None:
    subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code], check=True, timeout=120
    )


SETUP = """
import keyfold, numpy as np, os, sys, threading, time
rng = np.random.default_rng(1)
q = rng.standard_normal((1, 4, 64, 32), np.float32)
k, v = rng.standard_normal((2, 1, 2, 100_000, 32), np.float32)
def attend(): return keyfold.scaled_dot_product_attention(q, k, v)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_child_of_a_fork() -> None:
    run_python(
        SETUP
        + """
first = attend()
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(attend(), first) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )


@pytest.mark.parametrize("progress", ["None", "lambda _: None"])
def test_interpreter_ends_while_daemon_threads_call(progress: str) -> None:
    run_python(
        SETUP
        + f"""
def work():
    while True: keyfold.scaled_dot_product_attention(q, k, v, chunk_size=512, progress={progress})
for _ in range(4): threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
"""
    )
