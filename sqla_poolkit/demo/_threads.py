"""A load of threads."""

from __future__ import annotations

import threading
import time

from sqlalchemy import Engine, event
from sqlalchemy.pool import Pool

from ..pool.managed import ManagedPool
from .load import SIMULATED_CONNECT_SECONDS, Caller, Load, Plan, Step, clock

__all__ = ["ThreadLoad"]


class ThreadLoad(Load):
    """Each caller is a thread."""

    each_caller = "a thread each"

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self._engine = engine
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        super().__init__(engine, plan)

    @property
    def pool(self) -> Pool:
        """The pool that is measured."""
        return self._engine.pool

    def _teach_sleep(self, engine: Engine) -> None:
        super()._teach_sleep(engine)

        @event.listens_for(engine, "do_connect")
        def take_time(*_: object) -> None:
            time.sleep(SIMULATED_CONNECT_SECONDS)

    def begin(self) -> None:
        """Open the first connection."""
        with self._engine.connect() as connection:
            connection.execute(self.sleep, {"seconds": 0.0})

    def _start(self) -> None:
        for caller in self.callers:
            thread = threading.Thread(target=self._call, args=(caller,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _finish(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _call(self, caller: Caller) -> None:
        for step in caller.steps(self.began_at):
            if self._is_over.wait(max(0.0, step.at - clock())):
                return
            self._ask(caller, step)

    def _ask(self, caller: Caller, step: Step) -> None:
        with caller.asking(step.kind, self) as request, self._engine.connect() as connection:
            request.had_at = clock()
            connection.execute(self.sleep, {"seconds": step.seconds})
            if step.kind.commits:
                connection.commit()

    def close(self) -> None:
        """Close all connections."""
        pool = self._engine.pool
        if isinstance(pool, ManagedPool):
            pool.close()
        else:
            self._engine.dispose()
