"""Fixtures of the command's tests: a saved tiny model, and an empty working folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_command import saved_model, verbosity_put_back


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    with verbosity_put_back():
        yield tmp_path
