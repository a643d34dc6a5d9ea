"""The denoiser under pytest-benchmark: `pytest benchmarks`. A group is a batch, diffusers' own denoiser in it."""

import pytest
import torch

from noisepolicy.benchmarks.latency.cases import (
    EMBEDDED,
    DiffusersBaseline,
    ModelSpec,
    check_output,
    choose_engines,
    load_engine,
)
from noisepolicy.engines import ENGINES

_BATCHES = (1, 64)
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_SPEC = ModelSpec(EMBEDDED, "float32", _DEVICE)


@pytest.fixture(scope="module")
def baseline():
    return DiffusersBaseline(_SPEC)


@pytest.mark.parametrize("batch", _BATCHES)
@pytest.mark.parametrize("name", ["diffusers", *ENGINES])
@torch.no_grad()
def test_denoiser(name, batch, baseline, benchmark):
    benchmark.group = f"denoiser, batch {batch}, {_DEVICE.type}"
    module = baseline.denoiser
    if name != "diffusers":
        measured, reasons = choose_engines(None, _DEVICE)
        if name not in measured:
            pytest.skip(reasons[name])
        module = load_engine(_SPEC, name, None, rollout_batch_size=batch).frozen.denoiser
    embeds = baseline.encode(_SPEC.prompts(batch))
    latents = torch.randn(batch, *baseline.latent_shape, generator=torch.Generator().manual_seed(0))
    args, kwargs = baseline.denoiser_call(latents, embeds)
    check_output(name, module(*args, **kwargs)[0], baseline.denoiser(*args, **kwargs)[0], "float32", is_image=False)

    def call() -> None:
        module(*args, **kwargs)
        if _DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=10, warmup_rounds=2)
