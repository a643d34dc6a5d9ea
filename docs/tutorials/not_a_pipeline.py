# %% [markdown]
# # A model that is no diffusers pipeline
#
# Anything that turns noise and a prompt into a picture, the same picture every time, can be the frozen model. It
# needs three members:
#
# - `latent_shape`, the shape of the noise of one picture;
# - `encode(prompts)`, which returns a tensor `(batch, tokens, width)`;
# - `generate(latents, prompt_embeds, *, num_inference_steps, guidance_scale)`, which returns pictures in [0, 1].
#
# Here it is a simulator. The noise throws a ball, the wind that the prompt names carries it, and the picture
# shows where it lands.

# %%
import torch

import noisepolicy

WIND = {"wind from the left": 1.0, "calm": 0.0, "wind from the right": -1.0}


class Throws:
    latent_shape = (2, 4, 4)

    def encode(self, prompts):
        wind = torch.tensor([WIND[prompt] for prompt in prompts])
        return torch.stack([wind, 1 - wind], 1)[:, None]  # one token of two numbers

    def generate(self, latents, prompt_embeds, *, num_inference_steps, guidance_scale):
        x, y = latents.mean((2, 3)).mul(4).T  # each is N(0, 1) before training
        x = x + prompt_embeds.prompt_embeds[:, 0, 0]
        edge = torch.linspace(-2, 2, 16)
        distance = (edge - x[:, None, None]) ** 2 + (edge[:, None] - y[:, None, None]) ** 2
        return torch.exp(-4 * distance)[:, None].expand(-1, 3, -1, -1)


def middle(images, prompts):
    return images[:, 0, 6:10, 6:10].mean((1, 2))


# %% [markdown]
# The reward is high where the ball lands in the middle, so the policy has to throw against the wind.
# `algorithm="ppo"` learns without a critic; for so simple a model that is enough, and takes seconds. `bands=1`
# lets the policy choose the mean of each channel and nothing else, and `std="learned"` lets it throw more
# steadily too.

# %%
run = noisepolicy.train(
    Throws(),
    reward=middle,
    prompts=list(WIND),
    eval_prompts=list(WIND),
    eval_steps=(1,),
    algorithm="ppo",
    bands=1,
    std="learned",
    num_iterations=30,
)
print(run.evaluation)

# %% [markdown]
# The mean of 64 pictures of each prompt: without the policy above, with it below.

# %%
import matplotlib.pyplot as plt

model, policy = Throws(), run.policy
figure, axes = plt.subplots(2, 3, figsize=(6, 4.4))
for column, prompt in enumerate(WIND):
    starts = {
        "base": noisepolicy.noise(seed=1, index=range(64), shape=Throws.latent_shape),
        "policy": policy.latents(model, [prompt] * 64, seed=1),
    }
    for row, (name, latents) in enumerate(starts.items()):
        embeds = noisepolicy.PromptEmbeds(model.encode([prompt] * 64))
        pictures = model.generate(latents, embeds, num_inference_steps=1, guidance_scale=1.0)
        axes[row, column].imshow(pictures.mean(0)[0], cmap="gray", vmin=0, vmax=0.4)
        axes[row, column].set_title(f"{name}: {prompt}", fontsize=8)
        axes[row, column].axis("off")
figure.tight_layout()
