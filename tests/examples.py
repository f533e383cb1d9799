"""How many examples a property test runs: few in the gate, many with HYPOTHESIS_PROFILE=search."""

import os
from collections.abc import Callable
from typing import TypeVar

from hypothesis import settings

Test = TypeVar("Test", bound=Callable[..., object])


def examples(few: int, many: int) -> Callable[[Test], Test]:
    """``@settings(max_examples=few)``, or ``many`` when new examples are searched for."""
    count = many if os.environ.get("HYPOTHESIS_PROFILE") == "search" else few

    def decorate(test: Test) -> Test:
        return settings(max_examples=count)(test)

    return decorate
