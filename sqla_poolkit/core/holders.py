"""Who holds a connection: the label that the program gives."""

from __future__ import annotations

from contextvars import ContextVar
from types import TracebackType

__all__ = ["current_label", "held_by"]

current_label: ContextVar[str | None] = ContextVar("sqla_poolkit_label", default=None)
_blocks: ContextVar[tuple[held_by, ...]] = ContextVar("sqla_poolkit_blocks", default=())


class held_by:  # noqa: N801 - used like a function, as contextlib.suppress is
    """Name who holds the connections that are checked out inside the block.

    A web framework would write the route here, a worker the job::

        with held_by("GET /users"), engine.connect() as connection:
            ...

    The label crosses the borders of threads and tasks as context variables do; the innermost one
    counts.  Where a block ends in another context than it began in, that end changes nothing.
    Labels are rows in every snapshot: use the route, not the address with its ids.  One object may
    be used again and again, also by several threads at a time.
    """

    __slots__ = ("_label",)

    def __init__(self, label: str) -> None:
        name = str(label)
        # half a character, as of a file's name, would break whatever prints it
        self._label = name if name.isascii() else name.encode(errors="replace").decode()

    def __enter__(self) -> held_by:
        _blocks.set((*_blocks.get(), self))
        current_label.set(self._label)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        blocks = list(_blocks.get())
        if self not in blocks:
            return  # it began in another context, as a web framework's dependencies do
        # not always the last: generators may end in another order than they began
        del blocks[-1 - blocks[::-1].index(self)]
        _blocks.set(tuple(blocks))
        current_label.set(blocks[-1]._label if blocks else None)  # noqa: SLF001 - another of us
