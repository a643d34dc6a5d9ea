# %% [markdown]
# # Several rewards, and rewards held out
#
# A policy raises the number that it is given. If that number is not what you want, you get pictures that you do
# not want. This is *reward hacking*. Two habits show it: measure rewards that were not trained for, and look at
# the pictures.

# %%
from diffusers import StableDiffusionPipeline
from diffusers.utils import make_image_grid

import noisepolicy
from noisepolicy.worlds import shapes

pipe = StableDiffusionPipeline.from_pretrained(shapes.model_folder())
pipe.set_progress_bar_config(disable=True)
prompts = [scene.caption for scene in shapes.train_scenes()]
heldout = [scene.caption for scene in shapes.held_out_scenes()[:8]]
sizes = {"num_inference_steps": 2, "num_iterations": 7, "eval_steps": (2,), "eval_num_prompts": 8}

# %% [markdown]
# ## One reward alone
# `jpeg_compressibility` is minus the size of the picture as a JPEG file. It does not look at the prompt.
# `shapes`, which measures whether the caption is right, is held out: the run measures it and does not train for
# it.

# %%
alone = noisepolicy.train(
    pipe, reward="jpeg_compressibility", eval_rewards=["shapes"], prompts=prompts, output_dir="runs/alone", **sizes
)
print(alone.evaluation)

# %% [markdown]
# ## Both
# In a weighted sum each reward is first divided by its own spread between pictures of a prompt. So the weights
# are shares, whatever the units are.

# %%
both = noisepolicy.train(
    pipe, reward="0.7*shapes + 0.3*jpeg_compressibility", prompts=prompts, output_dir="runs/both", **sizes
)
print(both.evaluation)

# %% [markdown]
# The table has a row for each part of the sum. Look at the intervals before the gains: with 672 pictures each,
# these runs are far too short for more than a hint. In one run of this page the file size of the first policy
# improved by 0.057 (interval from 0.008 to 0.099), and no interval of `shapes` excluded 0.
#
# The pictures say more. From top to bottom: the base model, the policy for small files, the policy for both. Each
# caption names three shapes, and the policy for small files drew only two of them several times, because fewer
# shapes make a smaller file. That is how reward hacking begins.

# %%
base, small = alone.generate(heldout, seed=7, compare=True)
make_image_grid([*base, *small, *both.generate(heldout, seed=7)], rows=3, cols=8, resize=96)
