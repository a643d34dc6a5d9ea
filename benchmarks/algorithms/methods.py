"""The methods that `noisepolicy-bench algorithms` compares, and the size of its measurements."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["policy", "ddpo", "find", "cross_entropy", "random_search"]


@dataclass(frozen=True)
class Method:
    name: str
    title: str
    kind: Kind
    """"policy" and "ddpo" learn from training captions and are measured on held-out ones; the others search for each
    held-out caption on its own."""
    images: int
    """Number of images of a full run; for a search, per caption."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the defaults of `TrainConfig`."""
    model: str = "shapes"
    starts_from: str | None = None
    """The method whose policy this one starts from."""

    @property
    def is_per_prompt(self) -> bool:
        return self.kind not in ("policy", "ddpo")


METHODS = (
    Method("default", "spectral, with critic (the default)", "policy", 30_000),
    Method("spectral_ppo", "spectral, no critic", "policy", 30_000, {"algorithm": "ppo"}),
    Method("dense_critic", "dense, with critic", "policy", 12_000, {"policy": "dense"}),
    Method("noise_ppo", "dense, no critic (Noise PPO)", "policy", 30_000, {"algorithm": "ppo", "policy": "dense"}),
    Method("ddpo", "DDPO (changes the model)", "ddpo", 8_000),
    Method("find", "FIND", "find", 400),
    Method("find_low", "FIND, low frequencies", "find", 400, {"policy": "spectral", "bands": 4}),
    Method("find_amortised", "FIND from the default's policy", "find", 100, starts_from="default"),
    Method("cross_entropy", "cross-entropy method", "cross_entropy", 400),
    Method("random_search", "random search", "random_search", 400),
    Method(
        "video_default",
        "video, with critic (the default)",
        "policy",
        6_000,
        {"critic_learning_rate": 1e-3, "kl_budget": 45.0, "kl_training_budget": 100.0},
        model="moving_shapes",
    ),
    Method("video_find", "video, FIND", "find", 400, model="moving_shapes"),
)

ABLATIONS = (
    Method("recipe", "the default recipe", "policy", 12_000),
    Method("no_choice", "every draw as it comes", "policy", 12_000, {"num_candidates": 1}),
    Method("no_price", "no price on variety", "policy", 12_000, {"diversity_coef": 0.0}),
    Method("no_budget", "not scaled back to a KL budget", "policy", 12_000, {"kl_budget": math.inf}),
    Method("no_average", "the last weights, not their average", "policy", 12_000, {"average_decay": 0.0}),
    Method("std_one", "std 1: noise louder than noise", "policy", 12_000, {"std": "one"}),
    Method("std_learned", "std learned", "policy", 12_000, {"std": "learned"}),
    Method("bands_4", "4 frequencies an axis", "policy", 12_000, {"bands": 4}),
    Method("groups_of_8", "groups of 8", "policy", 12_000, {"group_size": 8}),
    Method("batches_of_192", "batches of 192", "policy", 12_000, {"batch_size": 192}),
    Method("several_steps", "trained at 1, 2, 4 and 8 steps", "policy", 12_000, {"num_inference_steps": (1, 2, 4, 8)}),
    Method("fewer_updates", "half the critic's updates", "policy", 12_000, {"critic_updates": 13}),
)
"""The default recipe with one thing changed. Twelve, like the methods: a report has as many colours."""


@dataclass(frozen=True)
class Scale:
    """The size of a measurement."""

    share: float
    """Share of each method's images that is made."""
    least: int
    """Smallest number of images of a method that learns from training captions."""
    num_prompts: int
    """Number of held-out captions that policies are measured on."""
    group_size: int
    """Number of images per caption."""
    num_searched: int
    """Number of held-out captions that are searched for."""
    step_counts: tuple[int, ...]
    """Step counts of the final sweep."""


FULL = {
    "shapes": Scale(1.0, 960, 48, 8, 32, (1, 2, 4, 8, 16)),
    "moving_shapes": Scale(1.0, 960, 24, 8, 12, (1, 2, 4, 8)),
}
QUICK = {
    "shapes": Scale(0.05, 960, 12, 4, 4, (1, 2, 4)),
    "moving_shapes": Scale(0.05, 960, 12, 4, 2, (1, 2, 4)),
}

CURVE = (480, 960, 1440, 1920, 2880, 3840, 4800, 6000, 8000, 10_000, 12_000, 16_000, 20_000, 25_000, 30_000)
"""Numbers of generated images at which a policy is measured."""
SEARCH_CURVE = (20, 40, 60, 80, 100, 150, 200, 300, 400)
"""Numbers of images per caption at which a search is measured."""
NUM_INFERENCE_STEPS = 2
GUIDANCE_SCALE = 1.5
