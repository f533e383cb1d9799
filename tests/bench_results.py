"""Results of a benchmark as its file holds them, made up."""

from typing import Any

PEERS: dict[str, Any] = {
    "machine": {"device": "a CPU", "torch": "2"},
    "about": {"size": 512, "seeds": 1, "call": {"num_inference_steps": 2}},
    "rows": [
        {"name": "tiledcore, shift", "seconds": 1.0, "seam_mean": 1.0, "patches": 0.1},
        {"name": "tiledcore, slow", "seconds": 4.0, "seam_mean": 1.0, "patches": 0.01},
        {"name": "beaten", "seconds": 2.0, "seam_mean": 1.1, "patches": 0.2},
        {"name": "faster", "seconds": 0.5, "seam_mean": 1.1, "patches": 0.2},
        {"name": "better", "seconds": 2.0, "seam_mean": 0.9, "patches": 0.2},
        {"name": "dense whole canvas", "seconds": 2.0, "seam_mean": 1.5, "patches": 0.2},
        {"name": "native samples", "patches": 0.05},
    ],
    "verdict": ["beaten: is beaten"],
}
