# %% [markdown]
# # Train a first policy
#
# A policy learns where a diffusion model should start. This page trains one on 1,152 pictures, a tenth of the
# default, so that it takes less than a minute on two CPU cores. It then looks at what the policy changed.
#
# The *embedded model* comes with the package. It draws coloured shapes from captions.

# %%
from diffusers import StableDiffusionPipeline
from diffusers.utils import make_image_grid

import noisepolicy
from noisepolicy.worlds import shapes

pipe = StableDiffusionPipeline.from_pretrained(shapes.model_folder())
pipe.set_progress_bar_config(disable=True)
train_prompts = [scene.caption for scene in shapes.train_scenes()]
train_prompts[:3]

# %% [markdown]
# At two denoising steps the model often draws something else than the caption says. The reward `shapes` measures
# how much of the caption is right, from 0 to 1. A fifth of the prompts is kept for the evaluation; the policy
# never trains on them.

# %%
run = noisepolicy.train(
    pipe,
    reward="shapes",
    prompts=train_prompts,
    num_inference_steps=2,
    num_iterations=12,  # of 96 pictures each; the default is 125
    eval_steps=(2,),
    eval_num_prompts=24,
    eval_group_size=4,
    output_dir="runs/first",
)

# %% [markdown]
# ## Did it help?
# One row: the base model's mean reward on held-out captions, the policy's from the same seeds, and the gain with
# its 95% interval. After so few pictures the gain is small: a run of 1,440 pictures came to +0.113, with an
# interval from +0.057 to +0.181. If an interval includes 0, the run has not shown that the policy helps; the
# [results](../results.html) show what the default reaches.

# %%
print(run.evaluation)

# %% [markdown]
# ## What did it change?
# The same captions and seeds, without the policy above and with it below. Only the starting noise differs.

# %%
prompts = [scene.caption for scene in shapes.held_out_scenes()[:8]]
base, learned = run.generate(prompts, seed=7, compare=True)
make_image_grid([*base, *learned], rows=2, cols=8, resize=96)

# %% [markdown]
# The noise is still as loud as noise: its standard deviation is near 1. Its mean over 200 seeds is not 0 any
# more, for it says where the policy moved it.

# %%
latents = run.policy.latents(pipe, [prompts[0]] * 200, seed=0, num_inference_steps=2, num_candidates=1)
print(f"standard deviation {latents.std():.3f}, largest mean of a latent {latents.mean(0).abs().max():.2f}")

# %% [markdown]
# ## Next
# `runs/first/report.html` shows all of this. [How to read the report](../start/report.html) explains its numbers.
