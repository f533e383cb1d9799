"""Functions that run in turns and meet: what each has is put together, and each goes on with its part of the result.

They are coroutines whose bodies do not know of it: a network's forward is stopped inside of a layer, until the other
tiles' forwards have come to the same layer. Each one has a thread, but only one of them runs at a time, in a fixed
order. So nothing that they share needs a lock, results do not depend on timing, and a GPU gets the work in one
order, on one stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from contextvars import copy_context
from threading import Condition, Thread
from typing import Any

import torch

UNEVEN = "some functions have finished while others wait to meet them"


class _Stopped(BaseException):
    """Ends a function's thread because another one failed; not an Exception, so that no layer catches it."""


class Turns:
    """One run of several functions; see :meth:`run` and :meth:`meet`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._condition = Condition()
        self._turn = 0
        self._given: dict[int, Any] = {}
        self._results: dict[int, Any] = {}
        self._finished: set[int] = set()
        self._error: BaseException | None = None

    def run(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        """Call every function, and return what they returned.

        A single one is called as it is. Of several, each has torch's modes, the current device and stream,
        and the context variables of the caller. Tensor modes (``FakeTensorMode``, ``set_default_device``) are the
        caller's alone: torch keeps them to one thread.

        Raises:
            BaseException: what one of the functions raised; the others are stopped where they would meet next.
            RuntimeError: one of them was finished while others met.
        """
        if len(functions) != self.count:
            raise ValueError(f"functions={len(functions)}: must be {self.count}")
        if self.count == 1:
            return [functions[0]()]
        results: list[Any] = [None] * self.count
        inherit = _torch_state()

        def work(index: int) -> None:
            try:
                with self._condition:
                    self._wait(index)
                with inherit():
                    results[index] = functions[index]()
            except _Stopped:
                pass
            except BaseException as error:
                with self._condition:
                    self._error = self._error or error
            finally:
                with self._condition:
                    self._finished.add(index)
                    self._pass_on(index)

        # Daemons: should the caller be killed while it waits, they must not keep the process.
        threads = [Thread(target=copy_context().run, args=(work, i), daemon=True) for i in range(self.count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C
            with self._condition:
                self._error = self._error or error
                self._condition.notify_all()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        if self._error is not None:
            raise self._error
        return results

    def meet(self, index: int, part: Any, combine: Callable[[list[Any]], Sequence[Any]]) -> Any:
        """Called by function ``index``: wait for the parts of all, and get this one's part of the result.

        Args:
            index: of the function, in the order of :meth:`run`.
            part: what it brings.
            combine: from all parts, in order, to one result for each; called once, by the last to come.
        """
        if self.count == 1:
            return combine([part])[0]
        with self._condition:
            self._given[index] = part
            if self._finished:
                raise RuntimeError(UNEVEN)
            if len(self._given) == self.count:
                parts = [self._given.pop(i) for i in range(self.count)]
                self._results = dict(enumerate(combine(parts)))  # with the lock, for nobody else may run
            self._pass_on(index)
            self._wait(index)
            if index not in self._results:
                raise RuntimeError(UNEVEN)
            return self._results.pop(index)

    def _pass_on(self, index: int) -> None:
        waiting = [i % self.count for i in range(index + 1, index + 1 + self.count)]
        self._turn = next((i for i in waiting if i not in self._finished), -1)
        self._condition.notify_all()

    def _wait(self, index: int) -> None:
        self._condition.wait_for(lambda: self._turn == index or self._error is not None)
        if self._error is not None:
            raise _Stopped


def _torch_state() -> Callable[[], ExitStack]:
    """What torch keeps for each thread, as it is here: a function that enters it elsewhere."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    stream = torch.cuda.current_stream() if cuda else None
    cast = {
        kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
        for kind in (("cpu", "cuda") if cuda else ("cpu",))
    }

    def enter() -> ExitStack:
        stack = ExitStack()
        if stream is not None:
            stack.enter_context(torch.cuda.device(stream.device))
            stack.enter_context(torch.cuda.stream(stream))
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind, (enabled, dtype, cache) in cast.items():
            if enabled:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cache))
        return stack

    return enter
