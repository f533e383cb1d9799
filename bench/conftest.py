"""For `pytest bench/`: the root off sys.path, as in bench/__init__.py, which pytest has imported by now."""

import bench  # noqa: F401
