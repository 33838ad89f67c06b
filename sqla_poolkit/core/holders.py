"""Who holds a connection: the label that the program gives."""

from __future__ import annotations

from contextvars import ContextVar
from types import TracebackType

__all__ = ["current_label", "held_by"]

current_label: ContextVar[str | None] = ContextVar("sqla_poolkit_label", default=None)
_outer_labels: ContextVar[tuple[str | None, ...]] = ContextVar("sqla_poolkit_labels", default=())


class held_by:  # noqa: N801 - used like a function, as contextlib.suppress is
    """Name who holds the connections that are checked out inside the block.

    A web framework would write the route here, a worker the job::

        with held_by("GET /users"), engine.connect() as connection:
            ...

    The label crosses the borders of threads and tasks as context variables do; the innermost one
    counts.  Labels are rows in every snapshot: use the route, not the address with its ids.  One
    object may be used again and again, also by several threads at a time.
    """

    __slots__ = ("_label",)

    def __init__(self, label: str) -> None:
        self._label = str(label)

    def __enter__(self) -> held_by:
        _outer_labels.set((*_outer_labels.get(), current_label.get()))
        current_label.set(self._label)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        *outer, label = _outer_labels.get()
        _outer_labels.set(tuple(outer))
        current_label.set(label)
