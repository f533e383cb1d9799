"""An object whose methods were replaced for a while is as it was."""

from threading import Thread
from typing import Any

import pytest
import torch

from tiledcore.utils import around_of, intercept, replaced


class Owner:
    def decode(self) -> str:
        return "the class'"

    def encode(self) -> str:
        return "the class'"


def test_what_was_there_before_shows_again() -> None:
    owner = Owner()
    vars(owner)["encode"] = lambda: "its own"
    before = dict(vars(owner))
    with replaced(owner, decode=lambda: "outer", encode=lambda: "outer"):
        with replaced(owner, decode=lambda: "inner"):
            assert (owner.decode(), owner.encode()) == ("inner", "outer")
        assert (owner.decode(), owner.encode()) == ("outer", "outer")
    assert (owner.decode(), owner.encode()) == ("the class'", "its own")
    assert vars(owner) == before


def test_an_error_inside_changes_nothing_of_that() -> None:
    owner = Owner()
    with pytest.raises(KeyError), replaced(owner, decode=None):
        assert owner.decode is None
        raise KeyError
    assert vars(owner) == {}


def test_a_module_does_not_take_it_for_a_part_of_itself() -> None:
    module = torch.nn.Linear(2, 2)
    other = torch.nn.Linear(3, 3)
    with replaced(module, forward=other):
        assert module(torch.zeros(1, 3)).shape == (1, 3)
        assert len(list(module.modules())) == 1
    assert module(torch.zeros(1, 2)).shape == (1, 2)


class Called:
    def __call__(self) -> str:
        return "own"


class Around:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, call: Any) -> str:
        return f"{self.name} {call()}"


def test_what_is_around_the_calls_of_one_thread_is_not_seen_by_others() -> None:
    owner, seen = Called(), []
    intercept(owner, Around("all"))
    intercept(owner, Around("first"), this_thread=True)

    def work() -> None:
        seen.append((owner(), around_of(owner, Around).name))
        intercept(owner, Around("second"), this_thread=True)
        seen.append((owner(), around_of(owner, Around).name))

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [("all own", "all"), ("second all own", "second")]
    assert (owner(), around_of(owner, Around).name) == ("first all own", "first")
