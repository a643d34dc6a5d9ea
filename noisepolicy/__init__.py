"""noisepolicy learns where a frozen diffusion model should start.

    run = noisepolicy.train(pipe, reward="pickscore", prompts="prompts.txt", num_inference_steps=2)
    latents = run.policy.latents(pipe, "a dog and a cat", seed=7)

Names are loaded when they are first used, so the import itself costs no more than torch's.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from noisepolicy.frozen import FrozenModel, PromptEmbeds
    from noisepolicy.frozen.families import register_family
    from noisepolicy.integrations.attaching import attach, detach
    from noisepolicy.policies import NoisePolicy
    from noisepolicy.prior import noise
    from noisepolicy.rewards import Reward
    from noisepolicy.training.config import CriticConfig, EvalConfig, ModelConfig, TrainConfig
    from noisepolicy.training.run import Run, resume, train
    from noisepolicy.training.search import search

_PLACES = {
    "CriticConfig": "noisepolicy.training.config",
    "EvalConfig": "noisepolicy.training.config",
    "FrozenModel": "noisepolicy.frozen",
    "ModelConfig": "noisepolicy.training.config",
    "NoisePolicy": "noisepolicy.policies",
    "PromptEmbeds": "noisepolicy.frozen",
    "Reward": "noisepolicy.rewards",
    "Run": "noisepolicy.training.run",
    "TrainConfig": "noisepolicy.training.config",
    "attach": "noisepolicy.integrations.attaching",
    "detach": "noisepolicy.integrations.attaching",
    "noise": "noisepolicy.prior",
    "register_family": "noisepolicy.frozen.families",
    "resume": "noisepolicy.training.run",
    "search": "noisepolicy.training.search",
    "train": "noisepolicy.training.run",
}

__all__ = [
    "CriticConfig",
    "EvalConfig",
    "FrozenModel",
    "ModelConfig",
    "NoisePolicy",
    "PromptEmbeds",
    "Reward",
    "Run",
    "TrainConfig",
    "attach",
    "detach",
    "load",
    "noise",
    "register_family",
    "resume",
    "search",
    "train",
]


def load(policy: Any) -> "NoisePolicy":
    """Load a policy from its folder, a run's folder or a hub id.

    Raises:
        OSError: if the files are not there.
        ValueError: if they are not a policy's.
    """
    from pathlib import Path

    from noisepolicy.policies import NoisePolicy

    folder = Path(policy) / "policy"
    return NoisePolicy.from_pretrained(folder if folder.is_dir() else policy)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        module = importlib.import_module(_PLACES[name])
        value = globals()[name] = getattr(module, name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
