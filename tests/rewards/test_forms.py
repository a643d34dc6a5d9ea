"""The forms that rewards come in: with metadata, with info, with PIL images, careless ones, and values of any kind."""

import itertools

import numpy as np
import pytest
import torch

from noisepolicy.prompt import Prompt
from noisepolicy.rewards import Reward, RewardError, load_reward
from noisepolicy.rewards.pil import PilReward

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt("one", {"count": 1}), Prompt("two", {"count": 2}), "three"]


def test_metadata_is_given_to_those_who_ask_for_it():
    def counts(images, prompts, metadata):
        return [record.get("count", 0) for record in metadata]

    def public_trainers_name_it_so(images, prompts, prompt_metadata):
        return counts(images, prompts, prompt_metadata), {}

    for function in (counts, public_trainers_name_it_so):
        assert Reward("counts", function)(IMAGES, PROMPTS).tolist() == [1, 2, 0]
    # Another third parameter is the reward's own affair.
    assert Reward("own", lambda images, prompts, scale=2: [scale] * 3)(IMAGES, PROMPTS).tolist() == [2, 2, 2]


@pytest.mark.parametrize("spec", ["frames({})", "cached({})", "2*{} + red"])
def test_metadata_reaches_a_reward_within_another(tmp_path, monkeypatch, spec):
    (tmp_path / "counting.py").write_text(
        "def counts(images, prompts, metadata):\n    return [record.get('count', 0) for record in metadata]\n"
    )
    monkeypatch.chdir(tmp_path)
    reward = load_reward(spec.format("counting:counts"))
    images = IMAGES[:, None].repeat(1, 2, 1, 1, 1) if "frames" in spec else IMAGES
    values = reward.parts(images, PROMPTS)[:, 0]
    assert values.tolist() == [1, 2, 0]


def test_cached_scores_are_not_those_of_other_metadata():
    calls = []

    def counts(images, prompts, metadata):
        calls.append(len(prompts))
        return [record["count"] for record in metadata]

    from noisepolicy.rewards.cache import CachedReward

    cached = CachedReward(Reward("counts", counts))
    for count in (1, 2, 1):
        assert cached(IMAGES[:1], [Prompt("same", {"count": count})]).tolist() == [count]
    assert calls == [1, 1]


def test_info_beside_the_scores():
    reward = Reward("pair", lambda images, prompts: ([1, 2, 3], {"strict": [0, 1, 1], "note": "x", "short": [1]}))
    assert reward(IMAGES, PROMPTS).tolist() == [1, 2, 3]
    metrics = reward.metrics(IMAGES, PROMPTS)
    assert set(metrics) == {"reward", "strict"} and metrics["strict"].tolist() == [0, 1, 1]
    # Two numbers for two images are no pair of scores and info.
    assert Reward("two", lambda images, prompts: (0.3, 0.5))(IMAGES[:2], PROMPTS[:2]).tolist() == [0.3, 0.5]


def test_pil_images(tmp_path, monkeypatch):
    (tmp_path / "pictures.py").write_text(
        "def width_and_red(images, prompts):\n"
        "    return [image.size[0] + image.getpixel((0, 0))[0] / 255 for image in images]\n"
    )
    monkeypatch.chdir(tmp_path)
    expected = 8 + (IMAGES[:, 0, 0, 0].double() * 255).round() / 255
    torch.testing.assert_close(load_reward("pil(pictures:width_and_red)")(IMAGES, PROMPTS), expected)
    clips = IMAGES[:, None].repeat(1, 2, 1, 1, 1)
    frames = Reward("frames", PilReward(lambda clips, prompts, metadata: [len(clip) for clip in clips]))
    assert frames(clips, PROMPTS).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match=r"pil\(red\).*it needs a function, module:function, in parentheses"):
        load_reward("pil(red)")


def test_each_reward_gets_images_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "careless.py").write_text(
        "def normalised(images, prompts):\n    images.sub_(images.mean()).mul_(0)\n    prompts.clear()\n"
        "    return [0.0] * len(images)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = IMAGES.clone()
    parts = load_reward("careless:normalised + brightness").parts(IMAGES, PROMPTS)
    assert torch.equal(IMAGES, before) and len(PROMPTS) == 3
    torch.testing.assert_close(parts[:, 1], before.mean((1, 2, 3)).double())


def test_torch_s_settings_are_put_back(tmp_path, monkeypatch):
    """A module that turns gradients off and changes the default dtype at its top, and again at every call."""
    change = "torch.set_grad_enabled(False); torch.set_default_dtype(torch.bfloat16); torch.set_default_device('meta')"
    (tmp_path / "settings.py").write_text(
        f"import torch\n{change}\ndef score(images, prompts):\n    {change}\n    return [0.5] * len(prompts)\n"
    )
    monkeypatch.chdir(tmp_path)
    try:
        reward = load_reward("settings:score")
        for _ in range(2):
            assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
            assert torch.get_default_device().type == "cpu"
            assert reward(IMAGES, PROMPTS).tolist() == [0.5] * 3
    finally:
        torch.set_grad_enabled(True), torch.set_default_dtype(torch.float32), torch.set_default_device("cpu")


GOOD = [0.25, -1.0, 3.0]
GOOD_VALUES = {
    "list": GOOD,
    "tuple": tuple(GOOD),
    "ints": [1, 2, 3],
    "bools": [True, False, True],
    "numpy": np.array(GOOD),
    "numpy float16": np.array(GOOD, np.float16),
    "numpy scalars": list(np.array(GOOD)),
    "tensors": [torch.tensor(value) for value in GOOD],
    "gradient": torch.tensor(GOOD, requires_grad=True),
    "float64": torch.tensor(GOOD).double(),
    "float16": torch.tensor(GOOD).half(),
    "bfloat16": torch.tensor(GOOD).bfloat16(),
    "column": torch.tensor(GOOD)[:, None],
    "int64": torch.tensor(GOOD).long(),
    "not contiguous": torch.tensor([GOOD, GOOD]).T[:, 0],
    "sparse": torch.tensor(GOOD).to_sparse(),
    "with info": (GOOD, {"why": object()}),
    "large": [1e300, -1e300, 0.0],
}


@pytest.mark.parametrize("name", GOOD_VALUES)
def test_values_of_many_kinds_are_numbers(name):
    value = GOOD_VALUES[name]
    numbers = value[0] if isinstance(value, tuple) and isinstance(value[1], dict) else value
    rewards = Reward("good", lambda images, prompts: value)(IMAGES, PROMPTS)
    assert rewards.dtype == torch.float64 and rewards.device.type == "cpu" and not rewards.requires_grad
    assert rewards.tolist() == [float(number) for number in (numbers.to_dense() if name == "sparse" else numbers)]


BAD = [
    None,
    "text",
    b"bytes",
    0.5,
    [0.5],
    [0.1, 0.2, 0.3, 0.4],
    [[0.1, 0.2]] * 3,
    torch.zeros(1, 3),
    torch.zeros(()),
    [0.1, float("nan"), 0.3],
    [0.1, float("inf"), 0.3],
    ["a", "b", "c"],
    [None, None, None],
    {"reward": GOOD},
    {},
    np.array([object(), object(), object()]),
    torch.zeros(3, dtype=torch.complex64),
    [1j, 2j, 3j],
    [10**400, 1, 2],
    torch.zeros(3, device="meta"),
    torch.zeros(0),
    [torch.zeros(2), torch.zeros(3), 0.1],
    (GOOD, "no dict"),
    object(),
    [[0.1, 0.2], [0.3], [0.4]],
    lambda: GOOD,
    (value for value in GOOD),
    set(GOOD),
]


@pytest.mark.parametrize("value", BAD, ids=lambda value: type(value).__name__)
def test_what_is_no_number_an_image_is_refused_in_one_line(value):
    with pytest.raises(RewardError, match="reward 'bad'") as error:
        Reward("bad", lambda images, prompts: value)(IMAGES, PROMPTS)
    assert "\n" not in str(error.value)


def test_shapes_and_dtypes_end_in_numbers_or_in_one_line():
    """Every shape of up to three axes with every dtype, as tensor, array and list."""
    dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.bool]
    for axes, dtype in itertools.product(
        itertools.chain(*(itertools.product((0, 1, 3), repeat=n) for n in range(4))), dtypes
    ):
        tensor = torch.arange(torch.Size(axes).numel()).reshape(axes).to(dtype)
        forms = [tensor, tensor.tolist()] + ([tensor.numpy()] if dtype != torch.bfloat16 else [])
        for value in forms:
            reward = Reward("any", lambda images, prompts, value=value: value)
            if axes in ((3,), (3, 1)):
                assert reward(IMAGES, PROMPTS).tolist() == tensor.double().flatten().tolist()
            else:
                with pytest.raises(RewardError, match="expected"):
                    reward(IMAGES, PROMPTS)
