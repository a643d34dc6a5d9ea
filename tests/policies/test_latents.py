"""`policy.latents`: every picture of a batch can be made again on its own, with any kind of model."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from noisepolicy.frozen import FrozenDiffusersPipeline, PromptEmbeds
from noisepolicy.ops import dct_basis, num_counters
from noisepolicy.policies import NoisePolicy, SpectralPolicy
from noisepolicy.policies.critic import CriticShape, RewardCritic
from noisepolicy.prior import noise
from noisepolicy.prompt import Prompt
from noisepolicy.worlds.shapes import held_out_scenes, model_folder

PROMPTS = [scene.caption for scene in held_out_scenes()[:5]]


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionPipeline.from_pretrained(model_folder())


@pytest.fixture
def policy():
    """One whose means are no longer zero, with a critic that chooses among eight starts."""
    torch.manual_seed(1)
    policy = SpectralPolicy(latent_shape=(8, 8, 8), prompt_shape=(20, 128))
    torch.nn.init.normal_(policy.mean.weight, std=0.1)
    critic = RewardCritic(CriticShape((20, 128), policy.action_shape, True, (2,)), size=3)
    policy.attach_critic(critic, num_candidates=8)
    return policy


def test_each_picture_of_a_batch_can_be_made_alone(pipeline, policy):
    batch = policy.latents(pipeline, PROMPTS, seed=7)
    assert batch.shape == (5, 8, 8, 8)
    for index, prompt in enumerate(PROMPTS):
        assert torch.equal(policy.latents(pipeline, prompt, seed=7, index=index), batch[index : index + 1])
    assert torch.equal(policy.latents(pipeline, PROMPTS[3:1:-1], seed=7, index=[3, 2]), batch[[3, 2]])
    assert torch.equal(policy.latents(pipeline, [Prompt(PROMPTS[0], {"id": 1})], seed=7), batch[:1])
    assert not torch.equal(policy.latents(pipeline, PROMPTS, seed=8), batch)


def test_how_many_candidates_is_chosen_when_they_are_drawn(pipeline, policy):
    batch = policy.latents(pipeline, PROMPTS, seed=7)
    assert torch.equal(policy.latents(pipeline, PROMPTS, seed=7, num_candidates=8), batch)
    more = policy.latents(pipeline, PROMPTS, seed=7, num_candidates=64)
    embeds, basis = FrozenDiffusersPipeline(pipeline).encode(PROMPTS).prompt_embeds, dct_basis(8, 8, batch.device)
    step_index = torch.zeros(5, dtype=torch.int64)
    eight, many = (policy.critic.lower_bound(embeds, basis @ x @ basis.T, step_index)[0] for x in (batch, more))
    assert (many >= eight - 1e-6).all() and (many > eight + 1e-6).any()
    plain = policy.latents(pipeline, PROMPTS, seed=7, num_candidates=1)
    policy.critic = None
    assert torch.equal(policy.latents(pipeline, PROMPTS, seed=7), plain)
    with pytest.raises(ValueError, match="no critic to choose among 8 candidates"):
        policy.latents(pipeline, PROMPTS, seed=7, num_candidates=8)
    with pytest.raises(ValueError, match="num_candidates must be from 1 to 65536, got 0"):
        policy.latents(pipeline, PROMPTS, seed=7, num_candidates=0)


def test_candidates_are_those_that_are_chosen_among(pipeline, policy):
    embeds = FrozenDiffusersPipeline(pipeline).encode(PROMPTS[:1]).prompt_embeds
    policy.critic.set_scale(0.0, 1.0)
    latents, foreseen = policy.candidates(embeds, 8, seed=7, num_inference_steps=2)
    assert latents.shape == (8, 8, 8, 8) and len(latents.unique(dim=0)) == 8 and foreseen.shape == (8,)
    chosen = policy.choose(embeds, seed=7, num_inference_steps=2)
    torch.testing.assert_close(latents[[int(foreseen.argmax())]], chosen, rtol=0, atol=1e-5)
    first = policy.choose(embeds, seed=7, num_candidates=1)
    torch.testing.assert_close(latents[:1], first, rtol=0, atol=1e-5)
    policy.critic = None
    assert policy.candidates(embeds, 1, seed=7)[1] is None


def test_a_prompt_that_comes_again_gets_noise_of_its_own(pipeline, policy):
    batch = policy.latents(pipeline, PROMPTS[:1] * 4, seed=7, num_inference_steps=2)
    assert len(batch.unique(dim=0)) == 4
    alone = policy.latents(pipeline, PROMPTS[:1], seed=7, index=3, num_inference_steps=2)
    assert torch.equal(alone, batch[3:])


def sketches(policy, pipeline, latents, prompt=PROMPTS[0]):
    """The critic's sketches of starts of one prompt, `(batch, numbers)`."""
    embeds, basis = FrozenDiffusersPipeline(pipeline).encode([prompt]).prompt_embeds, dct_basis(8, 8, latents.device)
    return policy.critic.sketch(embeds, basis @ latents @ basis.T, torch.zeros(1, dtype=torch.int64)).flatten(1)


def test_without_variety_the_foreseen_reward_alone_decides(pipeline, policy):
    """To the bit, against a choice by hand; a prompt that comes again is none to differ from."""
    prompts = [*PROMPTS[:2], *PROMPTS[:2]]
    chosen = policy.latents(pipeline, prompts, seed=7, num_candidates=3, num_inference_steps=2, variety=0)
    frozen, shape = FrozenDiffusersPipeline(pipeline), (8, 8, 8)
    for index, prompt in enumerate(prompts):
        embeds = frozen.encode([prompt]).prompt_embeds
        place = {"seed": 7, "offset": index * num_counters(shape), "latent_shape": shape}
        own, further = policy.sample(embeds, **place), policy._draw_further(*policy(embeds), 1, 2, **place)
        action, latents = (torch.cat(pair) for pair in ((own.action, further.action), (own.latents, further.latents)))
        values, _ = policy.critic.lower_bound(embeds, action, torch.zeros(1, dtype=torch.int64))
        assert torch.equal(chosen[index], latents[values.argmax()])


def test_the_last_index_has_as_many_candidates(monkeypatch):
    # Lots of which one would begin at candidate 65536, which has no counters at the last index.
    monkeypatch.setattr("noisepolicy.policies.base._CRITIC_ROWS", 13107)
    policy = SpectralPolicy(latent_shape=(1, 4, 4), prompt_shape=(2, 4), bands=2)
    policy.attach_critic(RewardCritic(CriticShape((2, 4), policy.action_shape, True, (1,)), size=2), 2**16)
    for variety in (0.0, 0.2):
        chosen = policy.choose(torch.ones(2, 2, 4), seed=7, offset=2**47 - 2 * num_counters((1, 4, 4)), variety=variety)
        assert chosen.isfinite().all()


@pytest.mark.parametrize("variety", [0.2, 1.0])
def test_with_variety_each_picture_can_be_made_alone(pipeline, policy, variety):
    options = {"seed": 7, "num_inference_steps": 2, "variety": variety}
    batch = policy.latents(pipeline, PROMPTS[:1] * 18, **options)
    assert len(batch.unique(dim=0)) == 18
    for index in (0, 3, 15, 16, 17):  # a set has 16 pictures
        assert torch.equal(policy.latents(pipeline, PROMPTS[0], index=index, **options), batch[index : index + 1])
    assert torch.equal(policy.latents(pipeline, PROMPTS[:1] * 2, index=[17, 2], **options), batch[[17, 2]])
    plain = policy.latents(pipeline, PROMPTS[:1] * 18, seed=7, num_inference_steps=2)
    assert torch.equal(batch[[0, 16]], plain[[0, 16]]), "the first of a set has none to differ from"
    assert not torch.equal(batch[1:16], plain[1:16])
    rows = FrozenDiffusersPipeline(pipeline).encode(PROMPTS[:1]).prompt_embeds.expand(18, -1, -1)
    assert torch.equal(policy.choose(rows, **options), batch)


def test_with_variety_each_prompt_counts_its_own_pictures(pipeline, policy):
    options = {"seed": 7, "variety": 0.2}
    first, second = (policy.latents(pipeline, [prompt] * 3, **options) for prompt in PROMPTS[:2])
    mixed = policy.latents(pipeline, [PROMPTS[0], PROMPTS[1]] * 3, **options)
    assert torch.equal(mixed, torch.stack([first, second], 1).flatten(0, 1))
    embeds = PromptEmbeds.cat([FrozenDiffusersPipeline(pipeline).encode([PROMPTS[1]])] * 3)
    assert torch.equal(policy.latents(embeds, **options), second)


def test_variety_draws_the_sketches_apart_and_costs_predicted_reward(pipeline, policy):
    distance, foreseen = [], []
    for variety in (0.0, 0.3, 1.0):
        latents = policy.latents(pipeline, PROMPTS[:1] * 8, seed=7, num_candidates=64, variety=variety)
        sketch = sketches(policy, pipeline, latents)
        distance.append(torch.pdist(sketch).mean())
        embeds, basis = FrozenDiffusersPipeline(pipeline).encode(PROMPTS[:1]).prompt_embeds, dct_basis(8, 8, "cpu")
        step_index = torch.zeros(1, dtype=torch.int64)
        foreseen.append(policy.critic.lower_bound(embeds, basis @ latents @ basis.T, step_index)[0].mean())
    assert distance[0] < distance[1] < distance[2]
    assert foreseen[0] > foreseen[1] > foreseen[2]


def test_the_second_picture_is_the_best_by_reward_and_distance(pipeline, policy):
    """Against a plain computation on all candidates at once."""
    first, second = policy.latents(pipeline, PROMPTS[:1] * 2, seed=7, num_candidates=100, variety=0.4)
    embeds = FrozenDiffusersPipeline(pipeline).encode(PROMPTS[:1]).prompt_embeds
    drawn = policy._draw_further(
        *policy(embeds), 1, 100, seed=7, offset=num_counters((8, 8, 8)), latent_shape=(8, 8, 8)
    )
    values, sketch = policy.critic.lower_bound(embeds, drawn.action, torch.zeros(1, dtype=torch.int64))
    distances = (sketch.flatten(1) - sketches(policy, pipeline, first[None])).square().mean(1).sqrt()
    z_values, z_distances = ((x - x.mean()) / x.std() for x in (values, distances))
    expected = drawn.latents[(0.6 * z_values + 0.4 * z_distances).argmax()]
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variety", [-0.1, 1.1, float("nan")])
def test_variety_out_of_range_is_refused(pipeline, policy, variety):
    with pytest.raises(ValueError, match="variety must be from 0 to 1, got"):
        policy.latents(pipeline, PROMPTS[0], seed=7, variety=variety)


def test_variety_needs_something_to_choose_among(pipeline, policy):
    for options in ({"num_candidates": 1}, {}):
        with pytest.raises(ValueError, match="variety needs a critic that chooses among two or more candidates"):
            policy.latents(pipeline, PROMPTS[0], seed=7, variety=0.2, **options)
        policy.critic = None


def test_pipeline_model_and_embeddings_give_the_same(pipeline, policy):
    expected = policy.latents(pipeline, PROMPTS, seed=7)
    frozen = FrozenDiffusersPipeline(pipeline)
    assert torch.equal(policy.latents(frozen, PROMPTS, seed=7), expected)
    embeds = PromptEmbeds.cat([frozen.encode([prompt]) for prompt in PROMPTS])
    assert torch.equal(policy.latents(embeds, seed=7), expected)
    assert torch.equal(policy.latents(embeds.prompt_embeds, seed=7, index=range(5)), expected)


def test_they_are_the_starts_of_an_evaluation(pipeline, policy):
    """`choose` on a batch, from an index on: what a sweep, a sample sheet and noisepolicy-generate start from."""
    embeds = FrozenDiffusersPipeline(pipeline).encode(PROMPTS).prompt_embeds
    chosen = policy.choose(embeds, seed=7, offset=30 * num_counters((8, 8, 8)), num_inference_steps=2)
    latents = policy.latents(pipeline, PROMPTS, seed=7, index=range(30, 35), num_inference_steps=2)
    torch.testing.assert_close(latents, chosen, atol=1e-5, rtol=0)


def test_before_training_they_are_the_prior(pipeline):
    policy = SpectralPolicy(latent_shape=(8, 8, 8), prompt_shape=(20, 128))
    latents = policy.latents(pipeline, PROMPTS, seed=7, index=range(3, 8))
    torch.testing.assert_close(latents, noise(seed=7, index=range(3, 8), shape=(8, 8, 8)), atol=1e-6, rtol=0)


def test_a_generator_draws_the_seed(pipeline, policy):
    sampled = policy.sample_latents(
        pipeline, PROMPTS[:2], generator=torch.Generator().manual_seed(5), num_images_per_prompt=2
    )
    seed = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(5)))
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert torch.equal(sampled, policy.latents(pipeline, prompts, seed=seed))


def test_other_sizes_have_noise_of_their_own(pipeline, policy):
    policy.critic = None
    batch = policy.latents(pipeline, PROMPTS[:3], seed=7, height=96, width=128)
    assert batch.shape == (3, 8, 12, 16)
    alone = policy.latents(pipeline, PROMPTS[2], seed=7, index=2, height=96, width=128)
    assert torch.equal(alone, batch[2:])


def test_embeddings_of_other_sizes_and_lengths(pipeline, policy):
    embeds = FrozenDiffusersPipeline(pipeline).encode(PROMPTS[:2]).prompt_embeds
    wide = policy.latents(embeds, seed=7, latent_shape=(8, 12, 16))
    assert torch.equal(wide[1:], policy.latents(embeds[1:], seed=7, index=1, latent_shape=(8, 12, 16)))
    assert torch.equal(policy.latents(embeds, seed=7, latent_shape=(8, 8, 8)), policy.latents(embeds, seed=7))
    assert torch.equal(policy.fit_tokens(torch.cat([embeds, embeds], 1)), embeds)
    short = policy.fit_tokens(embeds[:, :5])
    assert torch.equal(short[:, :5], embeds[:, :5]) and not short[:, 5:].any() and short.shape == embeds.shape
    for call, message in (
        (lambda: policy.latents(embeds, seed=7, latent_shape=(4, 8, 8)), r"latent_shape is \(4, 8, 8\)"),
        (lambda: policy.latents(pipeline, "a", seed=7, latent_shape=(8, 8, 8)), "with embeddings only"),
        (lambda: policy.fit_tokens(embeds[..., :64]), "embeddings 128 wide, and these are 64"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_any_object_with_encode_and_latent_shape(policy):
    class Model:
        latent_shape = (8, 8, 8)

        def encode(self, prompts):
            return torch.stack([torch.full((20, 128), len(prompt) / 100) for prompt in prompts])

    latents = policy.latents(Model(), ["a", "bcd"], seed=1)
    assert latents.shape == (2, 8, 8, 8) and latents.dtype == torch.float32
    assert torch.equal(policy.latents(Model(), "bcd", seed=1, index=1), latents[1:])


def test_errors_name_the_argument(pipeline, policy):
    embeds = torch.zeros(2, 20, 128)
    last = 2**47 // num_counters((8, 8, 8)) - 1
    for call, message in (
        (lambda: policy.latents(pipeline, seed=1), "prompts are missing.*got StableDiffusionPipeline"),
        (lambda: policy.latents(pipeline, [], seed=1), "prompts must hold at least one"),
        (lambda: policy.latents(pipeline, PROMPTS, seed=1, index=2), "index must have one number .* 5 prompts, got 1"),
        (lambda: policy.latents(pipeline, PROMPTS[0], seed=1, index=-1), f"index must be from 0 to {last} .*got -1"),
        (lambda: policy.latents(embeds, seed=1, index=[0, last + 1]), f"index must be from 0 to {last} "),
        (lambda: policy.latents(embeds, seed=-1), "seed must be an integer in .*got -1"),
        (lambda: policy.latents(embeds, seed=1, height=64), "height can be given with a diffusers pipeline only"),
        (lambda: policy.latents(embeds[0], seed=1), r"embeddings of shape \(20, 128\), but these have \(128,\)"),
        (lambda: policy.latents(embeds, seed=1, num_inference_steps=0), "num_inference_steps must be 1 or more, got 0"),
        (lambda: policy.latents("sd-turbo", "a dog", seed=1), "a diffusers pipeline is needed, got str"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_to_rounding(pipeline, policy, tmp_path):
    policy.save_pretrained(tmp_path)
    embeds = FrozenDiffusersPipeline(pipeline).encode(PROMPTS).prompt_embeds
    on_gpu = NoisePolicy.from_pretrained(tmp_path).latents(embeds.cuda(), seed=7)
    torch.testing.assert_close(on_gpu.cpu(), policy.latents(embeds, seed=7), atol=1e-5, rtol=0)
