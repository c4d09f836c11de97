"""What keyfold tells about a call, before, during and after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Chunk(NamedTuple):
    """One dispatch: groups x query rows x keys.

    A group is one key/value head of one batch entry together with the query heads that share it:
    ``group = batch_index * num_kv_heads + kv_head``.
    """

    group_begin: int
    group_end: int
    row_begin: int
    row_end: int
    key_begin: int
    key_end: int


@dataclass(frozen=True)
class Plan:
    """What a call will do.

    Attributes
    ----------
    backend, kernel : str
        The backend and its kernel (instruction set, GPU architecture).
    split_len : int
        Keys per split; chunk boundaries are multiples of it.
    paced : bool
        Chunk sizes follow the clock; `chunks` is then an estimate.
    budget_ms : float
        Longest device time of one dispatch in milliseconds.
    keys_per_chunk, rows_per_chunk : int
        The most keys and query rows of one chunk.
    rows_per_block, num_row_blocks : int
        Query rows whose state is in scratch together, and blocks of groups and rows.
    scratch_bytes : int
        State and packed keys; does not depend on kv_len.
    staging_bytes : int
        Copy of the output until the call is complete; 0 with one block.
    chunks : tuple of Chunk
        The dispatches, in their order.
    """

    backend: str
    kernel: str
    split_len: int
    paced: bool
    budget_ms: float
    keys_per_chunk: int
    rows_per_chunk: int
    rows_per_block: int
    num_row_blocks: int
    scratch_bytes: int
    staging_bytes: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Device:
    """One device of one backend.

    Attributes
    ----------
    backend : str
        The name to pass as ``backend``.
    name : str
        The device's own name.
    kernel : str
        The kernel in use (instruction set, GPU architecture).
    kernels : tuple of str
        Kernels that this device could use.
    num_threads : int
        Worker threads of a CPU, else 0.
    memory_bytes : int
        Memory of the device.
    max_head_dim : int
        Largest head_dim and value_dim.
    dtypes : tuple of str
        Dtypes of q, k and v.
    type : str
        "cpu", "discrete GPU", "integrated GPU", "virtual GPU" or "software GPU".
    driver : str
        Name and version of the device's driver; empty on the CPU.
    watchdog : str
        What ends long work here, as far as is known; or empty.
    max_shared_bytes : int
        Memory that a workgroup shares; 0 on the CPU.
    subgroup_size : int
        Lanes that run together; 0 on the CPU.
    """

    backend: str
    name: str
    kernel: str
    kernels: tuple[str, ...]
    num_threads: int
    memory_bytes: int
    max_head_dim: int
    dtypes: tuple[str, ...]
    type: str
    driver: str
    watchdog: str
    max_shared_bytes: int
    subgroup_size: int


@dataclass(frozen=True)
class Progress:
    """How far a call has come; a ``progress`` callback takes it after each dispatch.

    Attributes
    ----------
    dispatches : int
        Dispatches finished so far.
    fraction : float
        Share of the visible query-key pairs done, 0 to 1; 0 where it is not known.
    elapsed_ms : float
        Wall time since the call began, in milliseconds.
    last_dispatch_ms, longest_dispatch_ms : float
        Device time of the last dispatch and of the longest so far, in milliseconds.
    next_row : int
        Query rows below this one are finished.
    next_key : int
        Keys below this one are folded into the rows in flight.
    """

    dispatches: int
    fraction: float
    elapsed_ms: float
    last_dispatch_ms: float
    longest_dispatch_ms: float
    next_row: int
    next_key: int


@dataclass(frozen=True)
class Report:
    """How a call ran.

    Attributes
    ----------
    backend, kernel : str
        The backend that ran it and its kernel.
    dispatches : int
        Dispatches made.
    longest_dispatch_ms : float
        Longest device time of one dispatch, in milliseconds.
    elapsed_ms : float
        Wall time of the call, in milliseconds.
    scratch_bytes : int
        Scratch that was allocated.
    staging_bytes : int
        Copy of the output, when the rows came in several blocks.
    recoveries : int
        Times that the device was lost and replaced.
    """

    backend: str
    kernel: str
    dispatches: int
    longest_dispatch_ms: float
    elapsed_ms: float
    scratch_bytes: int
    staging_bytes: int
    recoveries: int


@dataclass(frozen=True)
class ContextParallelReport:
    """How a call of many ranks ran on this one.

    Attributes
    ----------
    report : Report
        Of this rank's dispatches and time.
    kv_len : int
        Keys of all ranks.
    messages : int
        Collective operations and messages that this rank began.
    message_bytes : int
        Their buffers, in and out, without what a collective operation repeats.
    waiting_ms : float
        Time in which this rank did nothing but wait for others, in milliseconds.
    """

    report: Report
    kv_len: int
    messages: int
    message_bytes: int
    waiting_ms: float
