"""The networks of the turbo world: 192 x 192 pictures, 4 x 24 x 24 latents.

The text encoder's shape and the teacher's noise schedule are those of the shapes world.
"""

import torch
from diffusers import AutoencoderTiny, EulerDiscreteScheduler, UNet2DConditionModel

from noisepolicy.worlds.shapes.networks import TEXT_WIDTH, build_scheduler
from noisepolicy.worlds.turbo.captions import COLORS

LATENT_CHANNELS = 4
LATENT_SIZE = 24
NUM_SLOTS = len(COLORS) + 1
"""The last tokens of a prompt: each says what the caption says of one colour, the last one the background."""
MAX_TOKENS = 49 + NUM_SLOTS
"""Length of a prompt: the longest caption with its start and end tokens, and end tokens for the slots."""


@torch.no_grad()
def build_vae() -> AutoencoderTiny:
    """Make the autoencoder, whose encoder needs no training; the decoder has 0.15 M parameters.

    The latents of 8 x 8 pixels are their mean red, green and blue, and the difference in brightness of two corners. A
    stride-2 convolution of 3 x 3 takes the mean of 2 x 2 pixels with four of its weights.
    """
    vae = AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(LATENT_CHANNELS,) * 4,
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(0, 0, 0, 0),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    first, *halves, last = vae.encoder.layers
    for layer in (first, *halves, last):
        layer.weight.zero_()
    to_channels = torch.cat([torch.eye(3), torch.full((1, 3), 1 / 3)])  # red, green, blue and brightness
    first.weight[:, :, 1, 1] = to_channels
    first.bias.zero_()
    for layer in halves:
        layer.weight[range(4), range(4), 1:, 1:] = 0.25
    halves[-1].weight[3, 3, 1:, 1:] = torch.tensor([[0.5, 0.0], [0.0, -0.5]])
    last.weight[range(4), range(4), 1, 1] = torch.tensor([2.0, 2.0, 2.0, 12.0])
    last.bias.copy_(torch.tensor([-1.0, -1.0, -1.0, 0.0]))
    vae.encoder.requires_grad_(False)
    return vae


def build_unet() -> UNet2DConditionModel:
    """Make the UNet of teacher and student; it has 4.7 M parameters.

    Attention is at 6 x 6 only, where most of the weights and little of the time are.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def build_turbo_scheduler() -> EulerDiscreteScheduler:
    """Make the student's scheduler: Euler steps from trailing timesteps, as SD-Turbo's."""
    config = build_scheduler().config
    return EulerDiscreteScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        prediction_type=config.prediction_type,
        timestep_spacing="trailing",
        steps_offset=1,
    )
