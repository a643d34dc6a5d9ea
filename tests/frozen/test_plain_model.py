"""Any object is a frozen model: what it leaves out has a default, and what it does wrong is said in one line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from noisepolicy.frozen import FrozenDiffusersPipeline, PlainModel, PromptEmbeds, as_frozen_model
from noisepolicy.frozen.recording import weights_digest
from noisepolicy.prompt import Prompt

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_frozen_model.py"
PROMPTS = ["calm", "windy"]
SETTINGS = {"num_inference_steps": 1, "guidance_scale": 1.0}


class Tones:
    """Not pictures but tones; it knows its own prompts and no others."""

    latent_shape = (2, 3)

    def __init__(self):
        self.net = nn.Linear(3, 5)

    def encode(self, prompts):
        return torch.tensor([[[0.0, 1.0], [1.0, 0.0]][PROMPTS.index(prompt)] for prompt in prompts])[:, None]

    def generate(self, latents, prompt_embeds, *, num_inference_steps, guidance_scale):
        return (self.net(latents) + prompt_embeds.prompt_embeds.mean((1, 2))[:, None, None]).sigmoid()


def draw(model, batch=2):
    return torch.randn(batch, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def make(**members):
    """A model that has these members in place of its own; None takes one away."""
    kept = {name: member for name, member in vars(Tones).items() if name in ("latent_shape", "encode", "generate")}
    kept = {name: member for name, member in (kept | members).items() if member is not None}
    return type("Strange", (), {"__init__": Tones.__init__, **kept})()


def test_the_object_is_given_plain_text():
    seen = []
    as_frozen_model(make(encode=lambda self, prompts: seen.extend(prompts) or torch.ones(2, 1, 2))).encode(
        [Prompt("calm", {"n": 1}), "windy"]
    )
    assert [type(prompt) for prompt in seen] == [str, str]


def test_the_example_learns():
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    _, _, before, _, after = done.stdout.splitlines()[0].split()
    report = Path(done.stdout.splitlines()[-1])
    assert "Where should this model start?" in report.read_text()
    assert float(after) > float(before.rstrip(",")) + 0.2, done.stdout


def test_three_members_are_enough():
    tones = Tones()
    model = as_frozen_model(tones, height=None)
    assert isinstance(model, PlainModel) and as_frozen_model(model) is model
    assert (model.latent_shape, model.engine, model.device) == ((2, 3), "eager", torch.device("cpu"))
    model.check_deterministic(1, 1.0)  # which can try nothing yet
    embeds = model.encode(PROMPTS)
    assert isinstance(embeds, PromptEmbeds) and torch.equal(embeds.prompt_embeds, tones.encode(PROMPTS))
    model.check_deterministic(2, 1.0)
    images = model.generate(draw(model), embeds, **SETTINGS)
    assert images.shape == (2, 2, 5) and not images.requires_grad
    torch.testing.assert_close(images, tones.generate(draw(model), embeds, **SETTINGS))
    model.drop_text_encoders()
    sha256 = model.weights_sha256()
    tones.net.weight.data[0, 0] += 1
    assert model.weights_sha256() != sha256


def test_its_own_members_come_first():
    dropped = []
    own = {"weights_sha256": lambda self: "own", "device": "cpu", "drop_text_encoders": lambda self: dropped.append(1)}
    model = as_frozen_model(make(**own), device="meta")
    model.drop_text_encoders()
    assert (model.weights_sha256(), model.device, dropped) == ("own", torch.device("cpu"), [1])


def test_a_module_is_hashed_whole_and_an_object_without_modules_not_at_all():
    class Net(nn.Linear):
        latent_shape, encode, generate = Tones.latent_shape, Tones.encode, Tones.generate

    net = Net(3, 5)
    assert as_frozen_model(net).weights_sha256() != as_frozen_model(Net(3, 5)).weights_sha256()
    assert len(as_frozen_model(net).weights_sha256()) == len(weights_digest(net))
    without = make(__init__=lambda self: None)
    assert as_frozen_model(without).weights_sha256() is None
    assert as_frozen_model(without).device is None
    assert as_frozen_model(without, device="cpu").device == torch.device("cpu")


def error_of(call):
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (make(generate=None), "Strange is no frozen model: it has no generate(...); it needs latent_shape, encode("),
        (make(encode=None, latent_shape=None), "it has no latent_shape and no encode(...); it needs"),
        (make(encode=3), "it has no encode(...)"),
        (Tones, "Tones is a class, and a frozen model is an object; make one: Tones(...)"),
        (make(latent_shape=8), "Strange.latent_shape must be a tuple of positive integers, got 8"),
        (make(latent_shape=(0, 8)), "Strange.latent_shape must be a tuple of positive integers, got (0, 8)"),
        (make(latent_shape=()), "Strange.latent_shape must be a tuple of positive integers, got ()"),
    ],
)
def test_an_object_that_is_no_frozen_model(model, message):
    assert message in error_of(lambda: as_frozen_model(model))


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        (torch.ones(2, 4), "(batch, tokens, width) of floats, got torch.float32 of shape (2, 4)"),
        (
            torch.ones(2, 1, 4, dtype=torch.int64),
            "(batch, tokens, width) of floats, got torch.int64 of shape (2, 1, 4)",
        ),
        (
            [[1.0], [2.0]],
            "Strange.encode must return PromptEmbeds or a tensor (batch, tokens, width) of floats, got list",
        ),
        (torch.ones(3, 1, 4), "Strange.encode gives 3 rows of prompt_embeds for 2 prompts"),
        (PromptEmbeds(torch.ones(2, 1, 4), torch.ones(1, 4)), "gives 1 rows of pooled_prompt_embeds for 2 prompts"),
        (torch.full((2, 1, 4), torch.nan), "Strange.encode gives NaN or infinity in prompt_embeds"),
    ],
)
def test_embeddings_that_are_none(embeds, message):
    model = as_frozen_model(make(encode=lambda self, prompts: embeds))
    assert message in error_of(lambda: model.encode(PROMPTS))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (lambda latents: latents.tolist(), "Strange.generate must return a tensor (batch, ...) of floats, got list"),
        (lambda latents: latents[:1][:0], "got torch.float32 of shape (0, 2, 3) for a batch of 1"),
        (lambda latents: latents.mean(), "got torch.float32 of shape () for a batch of 1"),
        (lambda latents: latents.to(torch.uint8), "got torch.uint8 of shape (1, 2, 3) for a batch of 1"),
        (lambda latents: latents / 0, "Strange.generate gives NaN or infinity"),
        (torch.rand_like, "Strange is stochastic at 1 steps: the same latents give different images"),
    ],
)
def test_images_that_are_none(images, message):
    model = as_frozen_model(make(generate=lambda self, latents, embeds, **settings: images(latents)))
    embeds = model.encode(PROMPTS)
    state = torch.get_rng_state()
    assert message in error_of(lambda: model.generate(draw(model), embeds, **SETTINGS))
    assert message in error_of(lambda: model.check_deterministic(1, 1.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_pipeline_alone_takes_is_refused(frozen):
    assert error_of(lambda: as_frozen_model(Tones(), height=64, cuda_graph=None)) == (
        "height: only a diffusers pipeline takes this, not Tones"
    )
    assert as_frozen_model(frozen) is frozen
    assert "height: only" in error_of(lambda: as_frozen_model(frozen, height=64))
    assert isinstance(as_frozen_model(frozen._pipeline, height=64), FrozenDiffusersPipeline)


def test_it_needs_no_diffusers():
    code = (
        "import sys; from noisepolicy.frozen import as_frozen_model; "
        "model = type('M', (), {'latent_shape': (1,), 'encode': len, 'generate': len})(); as_frozen_model(model); "
        "assert not {'diffusers', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
