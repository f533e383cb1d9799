"""Which paths an image may be written to."""

import os
from pathlib import Path

import pytest

from tiledcore.io.writers import check_target


def test_a_device_or_a_pipe_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/null")
    for name in ("a.png", "b.png"):
        with pytest.raises(ValueError, match=rf"{name}: cannot be written: it is a folder, a device or a pipe"):
            check_target(tmp_path / name, (8, 8))
    (tmp_path / "c.png").write_text("old")
    check_target(tmp_path / "c.png", (8, 8))
