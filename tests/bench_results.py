"""Results of benchmarks as their files hold them, made up."""

from typing import Any

MODES: dict[str, Any] = {
    "machine": {"device": "a CPU", "torch": "2"},
    "about": {"model": "earth", "size": 512, "prompts": ["a"], "seeds": 1, "steps": 2, "dtype": "bfloat16"},
    "rows": [
        {"name": "moving tiles", "seconds": 1.0, "seam_mean": 1.0, "patches": 0.1, "against": None},
        {"name": "slow", "seconds": 4.0, "seam_mean": 1.1, "patches": 0.01, "against": {"seam_mean": [0.1, 0.01]}},
        {"name": "native samples", "patches": 0.05},
    ],
}
