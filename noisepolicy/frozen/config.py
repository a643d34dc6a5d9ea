"""The settings of a frozen model: which one it is, how it is loaded, and what runs it."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from noisepolicy.settings import COUNT, Flat, Options

EngineName = Literal["auto", "eager", "compile", "onnx", "openvino", "tensorrt", "tensorrt-rtx"]
Dtype = Literal["float32", "float16", "bfloat16"]
SamplerNoise = Literal["learned", "fresh", "fixed", "refuse"]


@dataclass(frozen=True)
class ModelConfig:
    """Settings of the frozen model: which one it is, how it is loaded, and what runs it."""

    name: Annotated[str, Flat("model")] = "shapes"
    """The frozen model: 'shapes', 'moving_shapes' or 'turbo' (the embedded ones: pictures, clips, and pictures of a
    distilled model), a folder or hub id in diffusers' format, a .safetensors file with all weights of a model, or
    'module:object', an object with `encode` and `generate` from a Python module."""
    height: Annotated[int | None, COUNT] = None
    """Image height in pixels. Default: the model's own."""
    width: Annotated[int | None, COUNT] = None
    """Image width in pixels. Default: the model's own."""
    num_frames: Annotated[int | None, COUNT] = None
    """Frames of a video model's clips. Default: the model's own."""
    variant: str | None = None
    """Variant of the model's weight files, e.g. 'fp16'. A folder with files of a single variant needs none."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    single_file_config: str | None = None
    """Folder or hub id in diffusers' format with the configuration of a model that is a single file. Default: the
    published model of its kind."""
    denoiser_file: str | None = None
    """A .safetensors or .gguf file with the denoiser's weights, which replace the model's own."""
    lora: tuple[str, ...] = ()
    """LoRAs: files, folders, hub ids, or hub ids with a file (owner/name/file.safetensors), each with ':SCALE' for
    another strength than 1, e.g. style.safetensors:0.8. Needs peft."""
    fuse_lora: bool = False
    """Add the LoRAs to the model's weights, which is as fast as a model without LoRA."""
    quantize: str | None = None
    """Quantise the denoiser while it is loaded: 'torchao', or 'torchao:TYPE' with a type of torchao, e.g.
    torchao:int8_weight_only; 'quanto:int8' (int4, int2, float8); 'bitsandbytes_8bit', 'bitsandbytes_4bit' (nf4) or
    'bitsandbytes_4bit:fp4'. A copy that is quantised already needs none."""
    quantize_parts: tuple[str, ...] = ()
    """Components that `quantize` quantises, e.g. transformer text_encoder_2. Default: the denoiser."""
    scheduler: str | None = None
    """Name of a diffusers scheduler that replaces the model's own, with the same settings, e.g.
    EulerDiscreteScheduler."""
    scheduler_options: Annotated[dict[str, Any], Options("scheduler")] = field(default_factory=dict)
    """Setting of the scheduler, by its name in diffusers, e.g. `--scheduler.timestep_spacing trailing` or
    `--scheduler.shift 3`. Default: the scheduler's own."""
    image_columns: tuple[str, ...] = ()
    """Columns of the prompts that hold the path of an image, which the pipeline's call gets under the same name, e.g.
    `image mask_image` for inpainting. Images are brought to the height and width. One picture is made at a time."""
    sampler_noise: SamplerNoise = "learned"
    """Noise that some samplers draw between steps, as Euler ancestral, LCM, TCD and SCM do: 'learned' with the initial
    latents; 'fresh' for every picture, named by the run's seed and the picture's number; 'fixed', the same for every
    picture, which takes much of their variety; or 'refuse' such samplers."""
    call: Annotated[dict[str, Any], Options("call")] = field(default_factory=dict)
    """Further argument of the pipeline's call, by its name in diffusers, e.g. `--call.guidance_rescale 0.7` or
    `--call.sigmas 1.0,0.75,0.5,0.25`."""
    negative_prompt: str | None = None
    """Negative prompt of models with classifier-free guidance. Default: the pipeline's own."""
    max_sequence_length: Annotated[int | None, COUNT] = None
    """Tokens of a prompt, for pipelines that let one choose. Default: the pipeline's own."""
    dtype: Dtype | None = None
    """Data type of the frozen model. The policy, its latents and log-probs are always float32. Default: what
    `accelerate launch --mixed_precision` asks for, else float32."""
    device: str = "auto"
    """Device of the model and the policy: 'auto' (a CUDA device if there is one, else the CPU), 'cpu', 'cuda' or
    'cuda:N'."""
    engine: EngineName = "eager"
    """Engine that runs the denoiser and the VAE's decoder: PyTorch as it is or compiled, ONNX Runtime, OpenVINO on a
    CPU, TensorRT or TensorRT-RTX. Exported files are cached. 'auto' measures the engines that run here and takes the
    fastest."""
    engine_dtype: Dtype | None = None
    """Data type that an exported engine computes in. bfloat16 is fastest in OpenVINO where the CPU has it. Default: the
    model's."""
    rollout_vae: str | None = None
    """Folder or hub id of a small autoencoder that decodes the images of training, e.g. madebyollin/taesd. Sample
    pictures and the evaluation use the model's own."""
    rollout_batch_size: Annotated[int, COUNT] = 32
    """Largest number of images that the frozen model makes at a time. Processes share a batch in an even number of
    such chunks."""
    cuda_graph: bool = False
    """Replay the whole denoising loop as one CUDA graph for each batch size (Stable Diffusion and SDXL, on a GPU)."""
    vae_slicing: bool = False
    """Decode images one at a time, to save memory."""
    vae_tiling: bool = False
    """Decode images in tiles, to save memory."""
    cpu_offload: bool = False
    """Keep each part of the model on the GPU only while it works, to save memory (Accelerate's model offload)."""
    drop_text_encoders: bool = False
    """Encode every prompt at the start and free the text encoders, to save memory."""
