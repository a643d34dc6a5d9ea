"""The block of Modular Diffusers: tiny pipelines of real components start from a policy's latents."""

import copy

import pytest
import torch

import noisepolicy

diffusers = pytest.importorskip("diffusers", minversion="0.42")

from noisepolicy.frozen import FrozenDiffusersPipeline  # noqa: E402
from noisepolicy.integrations.modular_diffusers import LearnedNoiseStep, insert_learned_noise  # noqa: E402
from noisepolicy.policies import SpectralPolicy  # noqa: E402

from ..frozen.pipelines.modular import build_modular  # noqa: E402

NAMES = (
    "StableDiffusionXLModularPipeline",
    "StableDiffusion3ModularPipeline",
    "FluxModularPipeline",
    "ZImageModularPipeline",
    "QwenImageModularPipeline",
    "WanModularPipeline",
)
PROMPT = "a red circle above a blue square"


def tiny(name):
    """A pipeline with the block, the arguments of its call, and a policy for it that has learned something."""
    pipeline, call = build_modular(name)
    for part in pipeline.component_names:
        if "guider" in part:
            guidance = getattr(pipeline, part).new(guidance_scale=2.0, enabled=True)
            pipeline.update_components(**{part: guidance})
    options = {key: call[key] for key in ("height", "width", "num_frames", "max_sequence_length") if key in call}
    frozen = FrozenDiffusersPipeline(pipeline, **options)
    embeds = frozen.encode([PROMPT]).prompt_embeds
    torch.manual_seed(1)
    policy = SpectralPolicy(latent_shape=frozen.latent_shape, prompt_shape=tuple(embeds.shape[1:]), bands=2)
    torch.nn.init.normal_(policy.mean.weight, std=0.1)
    with_block = insert_learned_noise(pipeline.blocks).init_pipeline()
    parts = {key: part for key, part in pipeline.components.items() if part is not None and key != "feature_extractor"}
    with_block.update_components(**parts)
    with_block.set_progress_bar_config(disable=True)
    call |= {"num_inference_steps": 2}
    if "guidance_scale" in {param.name for param in pipeline.blocks.inputs}:
        call["guidance_scale"] = 2.0
    return with_block, call, policy, frozen, embeds


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_from_the_policys_latents(name):
    pipeline, call, policy, frozen, embeds = tiny(name)
    made = "videos" if "videos" in pipeline.blocks.output_names else "images"

    def images(**arguments):
        arguments = {"generator": torch.Generator().manual_seed(5), **call, **arguments}
        return torch.as_tensor(pipeline(prompt=PROMPT, output_type="pt", output=made, **arguments)).float()

    learned = images(noise_policy=policy, seed=7)
    latents = policy.latents(embeds, seed=7, num_inference_steps=2)
    expected = frozen.generate(latents, frozen.encode([PROMPT]), num_inference_steps=2, guidance_scale=2.0)
    torch.testing.assert_close(learned.reshape(expected.shape), expected, rtol=0, atol=1e-4)
    assert torch.equal(images(noise_policy=policy, seed=7, num_candidates=1), learned)
    assert not torch.allclose(images(noise_policy=policy, seed=8), learned, atol=1e-4)
    with pytest.raises(ValueError, match="variety needs a critic"):
        images(noise_policy=policy, seed=7, variety=0.5)
    # Without a policy the pipeline is as before.
    plain = images()
    assert torch.equal(plain, images(seed=7))
    assert not torch.allclose(plain, learned, atol=1e-4)


def test_a_policy_is_attached_and_detached():
    with_block, call, policy, _, _ = tiny("FluxModularPipeline")
    pipeline, _ = build_modular("FluxModularPipeline")
    parts = {key: part for key, part in with_block.components.items() if part is not None}
    pipeline.update_components(**parts)
    kind, settings = type(pipeline), {"prompt": PROMPT, "output": "images", "output_type": "pt", **call}
    plain = pipeline(generator=torch.Generator().manual_seed(5), **settings)
    assert noisepolicy.attach(pipeline, policy) is pipeline
    learned = pipeline(seed=7, **settings)
    assert torch.equal(learned, with_block(noise_policy=policy, seed=7, **settings))
    batch = pipeline(seed=7, num_images_per_prompt=3, **settings)
    torch.testing.assert_close(pipeline(seed=7, index=2, **settings), batch[2:], rtol=0, atol=1e-4)
    # As a frozen model it is the plain pipeline, and attached anew it has the other policy alone.
    frozen = FrozenDiffusersPipeline(pipeline, height=call["height"], width=call["width"])
    assert "noise_policy" not in {param.name for param in pipeline.blocks.inputs} and frozen.latent_shape
    other = copy.deepcopy(policy)
    torch.nn.init.normal_(other.mean.weight, std=0.1)
    noisepolicy.attach(pipeline, other)
    assert not torch.allclose(pipeline(seed=7, **settings), learned, atol=1e-4)
    assert noisepolicy.detach(pipeline) is pipeline and type(pipeline) is kind
    assert torch.equal(pipeline(generator=torch.Generator().manual_seed(5), **settings), plain)


def test_several_pictures_and_a_folder(tmp_path):
    pipeline, call, policy, _, _ = tiny("ZImageModularPipeline")
    policy.save_pretrained(tmp_path)
    settings = {**call, "output": "images", "output_type": "pt", "noise_policy": str(tmp_path), "seed": 7}
    batch = pipeline(prompt=PROMPT, num_images_per_prompt=3, **settings)
    alone = pipeline(prompt=PROMPT, index=2, **settings)
    torch.testing.assert_close(alone, batch[2:], rtol=0, atol=1e-4)


def test_what_does_not_fit_is_refused():
    pipeline, call, policy, *_ = tiny("FluxModularPipeline")
    other = SpectralPolicy(latent_shape=(7, 4, 4), prompt_shape=policy.prompt_shape, bands=2)
    with pytest.raises(ValueError, match="trained on latents of 7 channels, and FluxPrepareLatentsStep draws noise"):
        pipeline(prompt=PROMPT, noise_policy=other, seed=1, **call)
    with pytest.raises(ValueError, match="has no block inside that draws latents"):
        insert_learned_noise(LearnedNoiseStep(pipeline.blocks))
