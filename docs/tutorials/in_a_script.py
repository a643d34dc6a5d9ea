# %% [markdown]
# # A policy in an existing script
#
# You have a script that makes pictures with diffusers, and a trained policy. Two lines are enough.
#
# First, a small policy to use. Yours is a folder or an id of the hub.

# %%
from diffusers import StableDiffusionPipeline
from diffusers.utils import make_image_grid

import noisepolicy
from noisepolicy.worlds import shapes

pipe = StableDiffusionPipeline.from_pretrained(shapes.model_folder())
pipe.set_progress_bar_config(disable=True)
noisepolicy.train(
    pipe,
    reward="shapes",
    prompts=[scene.caption for scene in shapes.train_scenes()],
    num_inference_steps=2,
    num_iterations=8,
    eval_num_prompts=0,
    output_dir="runs/small",
)

# %% [markdown]
# ## The script before
# `guidance_scale=1.5` suits the embedded model.

# %%
prompts = [scene.caption for scene in shapes.held_out_scenes()[:4]]
before = pipe(prompts, num_inference_steps=2, guidance_scale=1.5).images

# %% [markdown]
# ## The script with a policy
# After `attach`, every call of the pipeline starts from the policy's noise. The call takes two more arguments:
# `seed` makes the pictures reproducible, and `index` makes one picture of a batch again on its own.

# %%
noisepolicy.attach(pipe, "runs/small")
after = pipe(prompts, num_inference_steps=2, guidance_scale=1.5, seed=7).images
third = pipe(prompts[2], num_inference_steps=2, guidance_scale=1.5, seed=7, index=2).images
make_image_grid([*before, *after, *third, *third, *third, *third], rows=3, cols=4, resize=96)

# %% [markdown]
# Above the script before, in the middle with the policy, and below the third picture, made again alone. The
# policy was trained on 768 pictures only, so do not expect much of it.
#
# `detach` gives the pipeline back as it was.

# %%
noisepolicy.detach(pipe)

# %% [markdown]
# ## Without attaching
# `policy.latents` returns the noise in the shape of the pipeline's `latents=`, so you decide what happens to it.

# %%
policy = noisepolicy.load("runs/small")
latents = policy.latents(pipe, prompts, seed=7, num_inference_steps=2)
again = pipe(prompts, latents=latents, num_inference_steps=2, guidance_scale=1.5).images
make_image_grid(again, rows=1, cols=4, resize=96)
