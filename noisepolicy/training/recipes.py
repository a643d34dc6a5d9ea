"""Each algorithm's own values of the settings that are left at None."""

import math
from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "critic": {
        "policy": "spectral",
        "bands": 8,
        "std": "power",
        "num_iterations": 125,
        "batch_size": 96,
        "group_size": 2,
        "learning_rate": 1e-3,
        "average_decay": 0.95,
        "num_updates": 8,
        "clip_range": 0.2,
        "target_kl": 1.0,
        "kl_budget": 14.0,
        "kl_training_budget": 30.0,
        "kl_coef": 4e-3,
    },
    "ppo": {
        "policy": "spectral",
        "bands": 8,
        "std": "power",
        "num_iterations": 300,
        "batch_size": 96,
        "group_size": 8,
        "learning_rate": 2e-3,
        "average_decay": 0.98,
        "num_updates": 8,
        "clip_range": 0.2,
        "target_kl": 0.3,
        "kl_budget": 45.0,
        "kl_training_budget": 120.0,
        "kl_coef": 4e-3,
    },
    "find": {
        "policy": "dense",
        "bands": 8,
        "std": "power",
        "num_iterations": 20,
        "group_size": 20,
        "learning_rate": 0.9,
        "average_decay": 0.0,
        "num_updates": 1,
        "clip_range": 0.2,
        "target_kl": math.inf,
        "kl_budget": math.inf,
        "kl_training_budget": math.inf,
        "kl_coef": 0.0,
    },
}
"""Values of the settings left at None, by algorithm: each algorithm's own best."""
