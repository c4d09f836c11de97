"""Attention over keys that arrive piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import _keyfold
from ._arrays import Results, check_tensors, new
from ._options import Window, callback_of, integer, native_options
from ._records import Progress


class AttentionState:
    """The running state (m, l, o) of attention for fixed queries, fed with keys as they come.

    Feeding the keys of one call in any number of pieces, cut anywhere, gives the same bits as that
    call. Of what was fed, less than one split is kept; the arrays `q`, `mask` and `sinks` are
    borrowed, and kept alive.

    Parameters
    ----------
    q : array, [batch, num_heads, q_len, head_dim]
        Queries, as in :func:`scaled_dot_product_attention`.
    mask, sinks, kv_lens, scale, causal, window, softcap
        As in :func:`scaled_dot_product_attention`; a mask's last axis is the absolute key
        position.
    q_offset : int, optional
        Key position of query row 0. Needed with `causal` and `window`, as kv_len is not known yet.
    first_key : int, optional
        Absolute position of the first key that will be fed: a multiple of the plan's `split_len`.
    backend, budget_ms, chunk_size, chunk_threshold, max_scratch_bytes, num_threads
        As in :func:`scaled_dot_product_attention`; the state of all rows must fit in
        `max_scratch_bytes`.
    progress : callable, optional
        Takes a :class:`Progress` after each dispatch.

    Raises
    ------
    InvalidArgument
        A ValueError that names the argument; also for a second call while one runs.

    Notes
    -----
    A wrong argument leaves the state as it was. After any other exception (KeyboardInterrupt
    included) it can only be dropped.

    Examples
    --------
    >>> import numpy as np, keyfold
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((1, 8, 1, 64), np.float32)
    >>> state = keyfold.AttentionState(q)
    >>> for _ in range(3):
    ...     k, v = rng.standard_normal((2, 1, 2, 1000, 64), np.float32)
    ...     state.update(k, v)
    >>> state.next_key
    3000
    >>> state.finish().shape
    (1, 8, 1, 64)
    """

    def __init__(
        self,
        q: Any,
        *,
        scale: float | None = None,
        mask: Any = None,
        causal: bool = False,
        q_offset: int | None = None,
        window: Window | None = None,
        softcap: float | None = None,
        sinks: Any = None,
        kv_lens: Sequence[int] | Any = None,
        first_key: int = 0,
        backend: str | None = None,
        budget_ms: float | None = None,
        chunk_size: int | None = None,
        chunk_threshold: int | None = None,
        max_scratch_bytes: int | None = None,
        num_threads: int | None = None,
        progress: Callable[[Progress], object] | None = None,
    ) -> None:
        check_tensors(q=q, mask=mask, sinks=sinks)
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
        self._progress = callback_of(progress)
        self._q = q
        self._shape, self._dtype = _keyfold.shape_and_dtype(q, "q")
        self._value_dim = 0
        self._state = _keyfold.State(q, options, integer("first_key", first_key))

    @property
    def next_key(self) -> int:
        """Absolute position of the next key: `first_key` plus the keys fed and skipped so far."""
        return self._state.next_key

    def update(self, k: Any, v: Any) -> None:
        """Fold the next keys.

        Parameters
        ----------
        k : array, [batch, num_kv_heads, n, head_dim]
            The next n >= 0 keys. The first update fixes num_kv_heads.
        v : array, [batch, num_kv_heads, n, value_dim]
            Their values. The first update fixes value_dim.

        Raises
        ------
        InvalidArgument
            A ValueError that names the argument; the state is unchanged.
        """
        check_tensors(k=k, v=v)
        self._state.update(k, v, self._progress)
        self._value_dim = _keyfold.shape_and_dtype(v, "v")[0][-1]

    def skip_to(self, key: int) -> None:
        """Go on at another key; those between are not seen, as if a mask hid them.

        Parameters
        ----------
        key : int
            Absolute position of the next key: a multiple of the plan's `split_len`, and at least
            `next_key`.

        Raises
        ------
        InvalidArgument
            A ValueError that names the argument; the state is unchanged.
        """
        self._state.skip_to(integer("key", key), self._progress)

    def merge(self, other: AttentionState) -> None:
        """Add the keys that another state has seen, and leave that state empty.

        Parameters
        ----------
        other : AttentionState
            A state of the same queries and options over other keys.

        Raises
        ------
        InvalidArgument
            The states do not fit together; both are unchanged.

        Notes
        -----
        Exact up to float32 rounding: the order of merging is not that of one call, so the bits may
        differ from it.
        """
        if not isinstance(other, AttentionState):
            raise TypeError(f"other: expected an AttentionState, got {type(other).__name__}")
        self._state.merge(other._state)
        self._value_dim, other._value_dim = self._value_dim or other._value_dim, 0

    def finish(self, *, return_lse: bool = False, out: Any = None) -> Any:
        """Give the result and leave the state empty, at `first_key` again.

        Parameters
        ----------
        return_lse : bool, optional
            Return the logsumexp too.
        out : array, [batch, num_heads, q_len, value_dim], optional
            Receives the result.

        Returns
        -------
        out : array, [batch, num_heads, q_len, value_dim]
            Of the library and dtype of `q`; or `out`. Where no key was fed, value_dim is head_dim.
        lse : array, [batch, num_heads, q_len]
            With `return_lse`: float32, natural logarithm, sinks included.

        Raises
        ------
        InvalidArgument
            `out` does not fit; nothing is written and the state is unchanged.
        """
        shape = (*self._shape[:-1], self._value_dim or self._shape[-1])
        results = Results(self._q, shape, self._dtype, out=out, with_lse=return_lse)
        self._state.finish(results.out, results.lse, self._progress)
        self._value_dim = 0
        return results.deliver()

    def save(self) -> tuple[Any, Any, Any]:
        r"""Copy the numbers of the state, which others may keep, send and merge.

        Two of them over disjoint keys merge by

        .. math::

            m &= \max(m_a, m_b) \\
            l &= e^{m_a - m} l_a + e^{m_b - m} l_b \\
            o &= e^{m_a - m} o_a + e^{m_b - m} o_b

        Returns
        -------
        m : array, [batch, num_heads, q_len]
            The largest score that a row has seen; -inf where it saw no key.
        l : array, [batch, num_heads, q_len]
            Sum of ``exp(score - m)``, without sinks.
        o : array, [batch, num_heads, q_len, value_dim]
            Sum of ``exp(score - m) v``. Where no key was fed, value_dim is head_dim.

        Notes
        -----
        All are float32, of the library of `q`. What was fed of an unfinished split is folded for
        it: keys can be fed after that only from the begin of a split on, see :meth:`skip_to`.
        """
        shape = (*self._shape[:-1], self._value_dim or self._shape[-1])
        shapes = (shape[:-1], shape[:-1], shape)
        m, sums, o = (new(self._q, shape, self._dtype, widen=True) for shape in shapes)
        self._state.save(m.memory, sums.memory, o.memory, self._progress)
        return m.deliver(), sums.deliver(), o.deliver()

    def load(self, m: Any, l: Any, o: Any, num_kv_heads: int) -> None:  # noqa: E741
        """Take these numbers for the keys seen so far, which are forgotten; `next_key` stays.

        With what :meth:`save` gave with the same kernel, the bits are as if this state had seen
        the keys.

        Parameters
        ----------
        m, l : array, [batch, num_heads, q_len]
            What :meth:`save` gave, or what several of these merge to, of the same queries and
            options. float32.
        o : array, [batch, num_heads, q_len, value_dim]
            Likewise.
        num_kv_heads : int
            Heads of the keys.

        Raises
        ------
        InvalidArgument
            A ValueError that names the argument; the state is unchanged.
        """
        check_tensors(m=m, l=l, o=o)
        self._state.load(m, l, o, integer("num_kv_heads", num_kv_heads))
        self._value_dim = _keyfold.shape_and_dtype(o, "o")[0][-1]
