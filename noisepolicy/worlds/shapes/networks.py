"""The networks of the embedded world: Stable Diffusion's parts, small. 64 x 64 pictures, 8 x 8 x 8 latents."""

from pathlib import Path

from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from noisepolicy.storage import read_tensors_and_metadata, write_tensors

LATENT_CHANNELS = 8
LATENT_SIZE = 8
TEXT_WIDTH = 128


def build_vae() -> AutoencoderTiny:
    """Make the autoencoder; it has 0.28 M parameters."""
    return AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = TEXT_WIDTH) -> CLIPTextModel:
    """Make the text encoder; at width 128 it has 0.7 M parameters.

    It is causal, as CLIP's: every token from the end token on has read the whole caption.
    """
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Make the UNet; it has 4.3 M parameters."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Make Stable Diffusion's scheduler, unchanged: with zero terminal SNR the first step would ignore its noise."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # unused with trailing spacing; the value diffusers expects of a Stable Diffusion scheduler
    )


def name_weights_for_every_transformers(folder: Path) -> None:
    """Rename the saved weights of the CLIP text encoder in `folder`, so that transformers 4 and 5 both read them.

    Transformers 5 saves them without the prefix `text_model.`. Transformers 4 then finds none of them, and leaves the
    encoder at its random initialisation with no more than a warning.
    """
    path = folder / "model.safetensors"
    tensors, metadata = read_tensors_and_metadata(path)
    write_tensors(path, {f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()}, metadata)
