"""The networks of the embedded video world: 6 frames of 48 x 48 pixels, 8 x 6 x 6 x 6 latents.

Autoencoder and noise schedule are the image world's.
"""

from diffusers import UNet3DConditionModel

from noisepolicy.worlds.shapes.networks import LATENT_CHANNELS

LATENT_SIZE = 6
TEXT_WIDTH = 96
MAX_TOKENS = 16
"""Length of a prompt: start token, 11 words, end token, and more end tokens, which have read the whole caption."""


def build_unet() -> UNet3DConditionModel:
    """Make the UNet; it has 4.2 M parameters."""
    return UNet3DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=16,
        norm_num_groups=16,
    )
