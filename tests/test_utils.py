"""An object whose methods were replaced for a while is as it was."""

import pytest
import torch

from tiledcore.utils import replaced


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
