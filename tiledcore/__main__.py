"""``python -m tiledcore`` is the command ``tiledcore``, as torchrun starts it."""

import sys

from tiledcore.cli.main import main

sys.exit(main())
