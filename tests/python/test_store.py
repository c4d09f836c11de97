"""Keys and values in files: open_source and KvStore in Python."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import keyfold
import numpy as np
import pytest
from reference import DTYPES


def same_bits(a: Any, b: Any) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_files_give_the_bits_of_arrays(dtype: str, inputs: Any, tmp_path: Path) -> None:
    q, k, v = inputs(6, 3000, dtype=dtype, value_dim=24)
    options: dict[str, Any] = {"causal": True, "window": (2000, None), "return_lse": True}
    out, lse = keyfold.scaled_dot_product_attention(q, k, v, **options)
    np.save(tmp_path / "k.npy", k.transpose(0, 2, 1, 3))
    np.save(tmp_path / "v.npy", v.transpose(0, 2, 1, 3))
    source = keyfold.open_source(
        tmp_path / "k.npy", tmp_path / "v.npy", layout="blhd", ahead_bytes=1 << 18
    )
    assert source.size == 3000
    assert not source.grows
    assert source.dtype == dtype
    assert source.shape == (q.shape[0], k.shape[1], k.shape[3], 24)
    for _ in range(2):
        again, lse_again = source.attend(q, **options)
        assert same_bits(again, out)
        assert same_bits(lse_again, lse)
    assert keyfold.last_report() is not None


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_store_serves_the_next_day(dtype: str, inputs: Any, tmp_path: Path) -> None:
    q, k, v = inputs(3, 1500, dtype=dtype)
    path = tmp_path / "chat.kv"
    shape = {"batch": k.shape[0], "num_kv_heads": k.shape[1], "head_dim": k.shape[3]}
    with keyfold.KvStore.create(path, **shape, dtype=dtype, block_len=512) as store:
        store.append(k[:, :, :1200], v[:, :, :1200])
        with pytest.raises(keyfold.IoError, match="no other writer"):
            keyfold.KvStore.append_to(path)
        reader = keyfold.KvStore.open(path)
        assert len(reader) == 1200
    assert reader.verify().keys == 1200
    store = keyfold.KvStore.append_to(path, durability="process")
    assert store.recovery == (True, 0, 0)
    store.append(k[:, :, 1200:], v[:, :, 1200:])
    expected = keyfold.scaled_dot_product_attention(q, k, v, causal=True)
    assert same_bits(reader.source().attend(q, causal=True), expected)
    store.close()
    with pytest.raises(keyfold.InvalidArgument, match="open for appending"):
        store.append(k, v)


def test_a_closed_store_is_a_safetensors_file(inputs: Any, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    _, k, v = inputs(1, 700)
    path = tmp_path / "chat.safetensors"
    shape = {"batch": k.shape[0], "num_kv_heads": k.shape[1], "head_dim": k.shape[3]}
    store = keyfold.KvStore.create(path, **shape, block_len=512)
    store.append(k, v)
    with pytest.raises(Exception, match="incomplete|Incomplete"):
        safetensors.load_file(path)
    store.close()
    tensors = safetensors.load_file(path)
    for name, array in (("k", k), ("v", v)):
        blocks = np.concatenate([tensors[f"{name}.0"], tensors[f"{name}.1"]], 2)
        assert same_bits(blocks[:, :, :700], array)


def test_a_follower_waits(inputs: Any, tmp_path: Path) -> None:
    q, k, v = inputs(3, 1000)
    path = tmp_path / "chat.kv"
    shape = {"batch": k.shape[0], "num_kv_heads": k.shape[1], "head_dim": k.shape[3]}
    store = keyfold.KvStore.create(path, **shape, durability="process")

    def write() -> None:
        for i in range(0, 1000, 50):
            store.append(k[:, :, i : i + 50], v[:, :, i : i + 50])
            time.sleep(0.001)
        store.close()

    follower = keyfold.KvStore.open(path).follow()
    assert follower.grows
    writer = threading.Thread(target=write)
    writer.start()
    out = follower.attend(q)
    writer.join()
    assert same_bits(out, keyfold.scaled_dot_product_attention(q, k, v))
    late = keyfold.KvStore.open(path).follow(until=1001, timeout=0.05)
    with pytest.raises(keyfold.IoError, match="expected key 1000 within"):
        late.attend(q)


@pytest.mark.usefixtures("heeds_sigint")
def test_ctrl_c_ends_a_wait(inputs: Any, tmp_path: Path) -> None:
    q, k, _ = inputs(3, 10)
    shape = {"batch": k.shape[0], "num_kv_heads": k.shape[1], "head_dim": k.shape[3]}
    store = keyfold.KvStore.create(tmp_path / "chat.kv", **shape)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        store.follow(timeout=60).attend(q)
    timer.join()


def test_what_is_wrong_is_named(inputs: Any, tmp_path: Path) -> None:
    q, k, v = inputs(3, 3000)
    np.save(tmp_path / "k.npy", k)
    np.save(tmp_path / "v.npy", v)
    with pytest.raises(OSError, match="cannot open"):
        keyfold.open_source(tmp_path / "absent.npy", tmp_path / "v.npy")
    with pytest.raises(keyfold.InvalidArgument, match="layout"):
        keyfold.open_source(tmp_path / "k.npy", tmp_path / "v.npy", layout="lbhd")
    with pytest.raises(keyfold.InvalidArgument, match="durability"):
        keyfold.KvStore.create(tmp_path / "x", num_kv_heads=1, head_dim=8, durability="none")
    with pytest.raises(keyfold.InvalidArgument, match="float32, float16 or bfloat16"):
        keyfold.KvStore.create(tmp_path / "x", num_kv_heads=1, head_dim=8, dtype="int8")
    source = keyfold.open_source(tmp_path / "k.npy", tmp_path / "v.npy")
    os.truncate(tmp_path / "v.npy", 1000)
    with pytest.raises(keyfold.IoError, match=r"v\.npy.*truncated"):
        source.attend(q)
