"""Objects behind the calls of RemoteActor, in the test's own event loop: no processes, no Ray."""

import asyncio
from collections.abc import Callable
from typing import Any

from actors.remote import resolve


class LocalActor:
    """Calls the methods (plain or coroutine) of `target`; a started call runs at once, its reference is a task."""

    def __init__(self, name: str, target: Any, on_call: Callable[[str, str, tuple[Any, ...]], None] | None = None) -> None:
        self.name = name
        self._target = target
        self._on_call = on_call

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        return await resolve(self.start(method, *args), edge=f"{self.name}.{method}", timeout_s=timeout_s)

    def start(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        answer = asyncio.ensure_future(self._run(method, args))
        if num_returns == 1:
            return answer
        return tuple(asyncio.ensure_future(_item(answer, index)) for index in range(num_returns))

    async def _run(self, method: str, args: tuple[Any, ...]) -> Any:
        # As with Ray: a reference reaches the method as its value, and a failed reference fails the call.
        values = [await value if asyncio.isfuture(value) else value for value in args]
        if self._on_call is not None:
            self._on_call(self.name, method, tuple(values))
        answer = getattr(self._target, method)(*values)
        return await answer if asyncio.iscoroutine(answer) else answer


async def _item(answer: "asyncio.Future[Any]", index: int) -> Any:
    return (await asyncio.shield(answer))[index]
