"""Functions in turns: what they get, who runs when, and that nothing hangs."""

from contextvars import ContextVar
from threading import Thread, current_thread
from typing import Any

import pytest
import torch

from tiledcore.turns import Turns

WORD: ContextVar[str] = ContextVar("word", default="none")


def run(functions: list[Any], turns: Turns) -> Any:
    """As ``turns.run``, but a hang fails the test."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(turns.run(functions))
        except BaseException as error:
            found.append(error)

    thread = Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it hangs"
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_gets_its_part_of_what_all_brought(count: int) -> None:
    turns, log = Turns(count), list[tuple[int, int]]()

    def make(index: int) -> Any:
        def body() -> int:
            total = 0
            for round_ in range(3):
                log.append((round_, index))
                total += turns.meet(index, 10**index, lambda parts: [sum(parts) + i for i in range(count)])
            return total

        return body

    everything = sum(10**i for i in range(count))
    assert run([make(i) for i in range(count)], turns) == [3 * (everything + i) for i in range(count)]
    assert log == [(round_, i) for round_ in range(3) for i in range(count)]  # one after the other, always in order


def test_a_single_function_needs_no_thread() -> None:
    here = current_thread()
    assert Turns(1).run([lambda: current_thread() is here]) == [True]


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("when", ["before", "between", "combining"])
def test_an_error_of_one_is_the_error_of_all(failing: int, when: str) -> None:
    turns, ended = Turns(3), list[int]()

    def combine(parts: list[int]) -> list[int]:
        if when == "combining":
            raise ZeroDivisionError("3")
        return parts

    def make(index: int) -> Any:
        def body() -> None:
            try:
                for round_ in range(3):
                    if index == failing and when == ("before", "between")[min(round_, 1)]:
                        raise ZeroDivisionError("3")
                    turns.meet(index, index, combine)
            finally:
                ended.append(index)

        return body

    with pytest.raises(ZeroDivisionError, match=r"^3$"):
        run([make(i) for i in range(3)], turns)
    # Those that had begun were ended where they waited; none is left in a thread.
    assert failing in ended or when == "combining"
    assert len(ended) == len(set(ended))


@pytest.mark.parametrize("rounds", [(1, 2), (2, 1), (0, 1), (1, 0)])
def test_who_finishes_while_others_wait_is_an_error(rounds: tuple[int, int]) -> None:
    turns = Turns(2)

    def make(index: int) -> Any:
        return lambda: [turns.meet(index, 0, lambda parts: parts) for _ in range(rounds[index])]

    with pytest.raises(RuntimeError, match="some functions have finished while others wait"):
        run([make(i) for i in range(2)], turns)


def test_torchs_modes_and_the_context_are_the_callers() -> None:
    turns = Turns(2)

    def state() -> tuple[Any, ...]:
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, WORD.get()

    def body(index: int) -> Any:
        return lambda: turns.meet(index, state(), lambda parts: parts)

    functions = [body(0), body(1)]
    token = WORD.set("heard")
    try:
        for inference in (False, True):
            with torch.inference_mode(inference), torch.set_grad_enabled(False), torch.autocast("cpu", torch.float16):
                expected = state()
                assert expected == (False, inference, True, torch.float16, "heard")
                assert turns.run(functions) == [expected, expected]
                turns = Turns(2)
    finally:
        WORD.reset(token)
