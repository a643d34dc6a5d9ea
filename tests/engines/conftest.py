"""The embedded model on every engine that runs here, exported once into a cache of the session's own."""

import pytest
import torch

from noisepolicy.engines import available_engines, use_engine
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.worlds.shapes import held_out_scenes, model_folder

from ..frozen.conftest import family_folder  # noqa: F401  a fixture here too

NUM_ROWS = 16


@pytest.fixture(scope="session")
def on_engine():
    """Return a function that puts the embedded model on an engine, by name and dtype; skip if it does not run here."""
    made: dict[tuple[str, str | None], FrozenDiffusersPipeline] = {}

    def get(name: str, dtype: str | None = None, **options) -> FrozenDiffusersPipeline:
        if reason := available_engines(torch.device("cpu"))[name]:
            pytest.skip(reason)
        if options or (name, dtype) not in made:
            frozen = FrozenDiffusersPipeline.from_pretrained(model_folder(), **options)
            use_engine(frozen, name, dtype=dtype)
            if options:
                return frozen
            made[name, dtype] = frozen
        return made[name, dtype]

    return get


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return [scene.caption for scene in held_out_scenes()[:NUM_ROWS]]


@pytest.fixture(scope="session")
def latents(frozen: FrozenDiffusersPipeline) -> torch.Tensor:
    return torch.randn(NUM_ROWS, *frozen.latent_shape, generator=torch.Generator().manual_seed(0))
