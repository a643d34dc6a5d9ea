# %% [markdown]
# # Your own pipeline and reward function
#
# noisepolicy takes a diffusers pipeline as it is in memory: with its scheduler, LoRAs, quantised or compiled
# parts. It leaves the pipeline as it was found. Here the embedded model gets another scheduler first.

# %%
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.utils import make_image_grid

import noisepolicy
from noisepolicy.worlds import shapes

pipe = StableDiffusionPipeline.from_pretrained(shapes.model_folder())
pipe.set_progress_bar_config(disable=True)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

# %% [markdown]
# A reward is a function of pictures and prompts that gives one number for each picture. The pictures are float32
# in [0, 1], of shape `(batch, 3, height, width)`. This one likes pictures whose left half is darker than their
# right half, whatever the prompt says. It is a toy, but no one has trained the model for it.


# %%
def dark_on_the_left(images, prompts):
    left, right = images.chunk(2, dim=3)
    return right.mean((1, 2, 3)) - left.mean((1, 2, 3))


# %% [markdown]
# Try a function on a few pictures before you train with it. If it gives nearly the same number for every picture
# of a prompt, then no choice of noise can change much.

# %%
prompts = [scene.caption for scene in shapes.train_scenes()]
latents = noisepolicy.noise(seed=0, index=range(8), shape=(8, 8, 8))
pictures = pipe([prompts[0]] * 8, latents=latents, num_inference_steps=2, guidance_scale=1.5, output_type="pt").images
dark_on_the_left(pictures, [prompts[0]] * 8)

# %%
run = noisepolicy.train(
    pipe,
    reward=dark_on_the_left,
    prompts=prompts,
    num_inference_steps=2,
    num_iterations=8,
    eval_steps=(2,),
    eval_num_prompts=12,
    eval_group_size=4,
    eval_rewards=["shapes"],  # is the caption still right?
    output_dir="runs/dark_on_the_left",
)
print(run.evaluation)

# %%
heldout = [scene.caption for scene in shapes.held_out_scenes()[:8]]
base, learned = run.generate(heldout, seed=7, compare=True)
make_image_grid([*base, *learned], rows=2, cols=8, resize=96)

# %% [markdown]
# Base model above, policy below. The row of `shapes` matters as much as the gain: a policy for a reward
# that does not look at the prompt may give up what the prompt asks for. In one run of this page the gain was
# +0.088 (interval from +0.058 to +0.125), and the interval of `shapes` included 0: no harm shown, and with 12
# prompts none ruled out either.
#
# To train with the function from a shell, put it into a module: `noisepolicy-train --reward
# my_module:dark_on_the_left`.
