"""A load of tasks: an event loop of its own, in a thread of its own, as a server runs it.

The live table is drawn in the main thread, as it is beside a load of threads, and Ctrl-C arrives
there too.  Only a demo with ``--async`` imports this: it needs greenlet.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

from sqlalchemy import Engine, event, exc
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import Pool

from ..pool.managed_async import AsyncManagedPool
from .load import SIMULATED_CONNECT_SECONDS, Caller, Load, Plan, Step, clock

__all__ = ["TaskLoad"]


class TaskLoad(Load):
    """Each caller is a task; all run on one event loop."""

    each_caller = "a task each, on one event loop"

    def __init__(self, engine: AsyncEngine, plan: Plan) -> None:
        super().__init__(engine.sync_engine, plan)
        self._engine = engine
        self._loop = asyncio.new_event_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._work: Future[None] | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @property
    def pool(self) -> Pool:
        """The pool that is measured."""
        return self._engine.pool

    def _teach_sleep(self, engine: Engine) -> None:
        super()._teach_sleep(engine)

        @event.listens_for(engine, "connect")
        def take_time(dbapi_connection: Any, _record: object) -> None:
            # in the task that connects, and without keeping the other tasks
            dbapi_connection.run_async(lambda _: asyncio.sleep(SIMULATED_CONNECT_SECONDS))

    def _submit(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._work = future
        return future

    def begin(self) -> None:
        """Open the first connection."""
        try:
            self._submit(self._begin()).result()
        except TypeError as error:
            # asyncpg gets what follows the '?' of a URL as arguments
            raise exc.ArgumentError(str(error)) from error

    async def _begin(self) -> None:
        async with self._engine.connect() as connection:
            await connection.execute(self.sleep, {"seconds": 0.0})

    def _start(self) -> None:
        self._submit(self._call_all())

    def _finish(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set_result, None)
        if self._work is not None:
            self._work.result()

    async def _call_all(self) -> None:
        await asyncio.gather(*map(self._call, self.callers))

    async def _call(self, caller: Caller) -> None:
        for step in caller.steps(self.began_at):
            if await self._is_over_at(step.at):
                return
            await self._ask(caller, step)

    async def _is_over_at(self, moment: float) -> bool:
        seconds = moment - clock()
        if seconds > 0:
            await asyncio.wait([self._over], timeout=seconds)
        return self._over.done()

    async def _ask(self, caller: Caller, step: Step) -> None:
        with caller.asking(step.kind, self) as request:
            async with self._engine.connect() as connection:
                request.had_at = clock()
                await connection.execute(self.sleep, {"seconds": step.seconds})
                if step.kind.commits:
                    await connection.commit()

    def close(self) -> None:
        """Close all connections, and the event loop."""
        if self._loop.is_closed():
            return
        if self._work is not None:
            self._work.cancel()  # if somebody was too impatient to wait for its end
        # whoever interrupts even this leaves the loop to the end of the process
        self._submit(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        pool = self._engine.pool
        if isinstance(pool, AsyncManagedPool):
            await pool.close()
        else:
            await self._engine.dispose()
        # SQLAlchemy closes what was cut off in tasks of its own
        for task in await _still_running():
            task.cancel()  # a server that does not answer
        await _still_running()
        # aiosqlite has one more word for the loop after a connect that failed
        await asyncio.sleep(0.05)


async def _still_running(patience: float = 1.0) -> set[asyncio.Task[Any]]:
    """Wait for all other tasks, not for long; return those that go on."""
    others = {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
    if others:
        _, others = await asyncio.wait(others, timeout=patience)
    return others
