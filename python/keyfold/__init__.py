"""Exact attention over key sequences of any length, in dispatches that fit a time budget.

``keyfold.torch``, ``keyfold.mlx`` and ``keyfold.transformers`` stand in for the attention of
these libraries; ``keyfold.mpi`` is for keys spread over the ranks of an MPI job; ``python -m
keyfold`` is the command-line tool.
"""

from ._attention import last_report, merge_state, scaled_dot_product_attention
from ._errors import (
    DeviceError,
    Error,
    InternalError,
    InvalidArgument,
    IoError,
    OutOfMemoryError,
    PeerError,
    UnsupportedError,
)
from ._keyfold import version as __version__
from ._plan import devices, plan, shard_keys, shard_rows
from ._records import Chunk, Device, Plan, Progress, Report
from ._source import KeyValueSource, open_source
from ._state import AttentionState
from ._store import KvStore, RecoveryReport, VerifyReport

__all__ = [
    "AttentionState",
    "Chunk",
    "Device",
    "DeviceError",
    "Error",
    "InternalError",
    "InvalidArgument",
    "IoError",
    "KeyValueSource",
    "KvStore",
    "OutOfMemoryError",
    "PeerError",
    "Plan",
    "Progress",
    "RecoveryReport",
    "Report",
    "UnsupportedError",
    "VerifyReport",
    "__version__",
    "devices",
    "last_report",
    "merge_state",
    "open_source",
    "plan",
    "scaled_dot_product_attention",
    "shard_keys",
    "shard_rows",
]
