"""Pipelines that cannot be frozen models: what is said to whoever tries, and why in plain words."""

_OWN_NOISE = ("is stochastic", "encodes its control picture with noise that no generator decides")
_TOKENS = ("has no encode_prompt", "changes tokens, and not latents")
_NO_ENCODER = ("has no encode_prompt", "encodes prompts in a pipeline inside itself, and has no `encode_prompt`")
_EMBEDDINGS = ("makes height 2 where 64 was asked for", "makes embeddings of a picture, which no reward can see")
_WITHIN_CALL = ("has no encode_prompt", "encodes prompts within its own call, and has no `encode_prompt`")
_QFORMER = ("has no attribute 'invert_attention_mask'", "fails by itself with transformers 5")
_VECTOR = ("draws noise of shape", "starts from a vector, not from latents with axes")
_NO_STEPS = "takes no num_inference_steps"
_TORCHVISION = "needs torchvision, which is not installed where this list was made"
_COSMOS = ("You have disabled the safety checker", "refuses to run without its safety checker")

REFUSED: dict[str, tuple[str, str]] = {
    "StableDiffusion3ControlNetPipeline": _OWN_NOISE,
    "StableDiffusion3ControlNetInpaintingPipeline": _OWN_NOISE,
    "QwenImageControlNetInpaintPipeline": _OWN_NOISE,
    "CogView4ControlPipeline": _OWN_NOISE,
    "VideoToVideoSDPipeline": ("draws noise of shape", "draws a row of noise for each frame, not for each prompt"),
    "KandinskyV22PriorPipeline": _VECTOR,
    "KandinskyV22PriorEmb2EmbPipeline": _VECTOR,
    "KandinskyPriorPipeline": _VECTOR,
    "ShapEPipeline": _VECTOR,
    "KandinskyCombinedPipeline": _NO_ENCODER,
    "KandinskyImg2ImgCombinedPipeline": _NO_ENCODER,
    "KandinskyInpaintCombinedPipeline": _NO_ENCODER,
    "AmusedPipeline": _TOKENS,
    "AmusedImg2ImgPipeline": _TOKENS,
    "AmusedInpaintPipeline": _TOKENS,
    "DiffusionGemmaPipeline": ("has no encode_prompt", "writes text"),
    "LLaDA2Pipeline": ("has no encode_prompt", "writes text"),
    "LDMTextToImagePipeline": _WITHIN_CALL,
    "Cosmos3OmniPipeline": _WITHIN_CALL,
    "JoyImageEditPlusPipeline": (
        "has no encode_prompt",
        "encodes prompts by a method of another name, together with pictures",
    ),
    "GlmImagePipeline": ("writes tokens of the picture", "writes tokens of the picture from its prompt first"),
    "BlipDiffusionPipeline": _QFORMER,
    "BlipDiffusionControlNetPipeline": _QFORMER,
    "LTX2HDRPipeline": ("makes height 64 where 32 was asked for", "gives videos of linear light, the channels last"),
    "VQDiffusionPipeline": ("draws no initial noise", "changes tokens, and not latents"),
    "VersatileDiffusionDualGuidedPipeline": (
        "has no encode_prompt",
        "encodes a prompt and a picture, which stand side by side, and has no `encode_prompt`",
    ),
    "FluxPriorReduxPipeline": (_NO_STEPS, "makes embeddings of a picture, without noise and steps"),
    "LTX2DFRPipeline": (_NO_STEPS, "takes sigmas in the place of a step count"),
    "LTX2DFRTemporalRefinePipeline": (_NO_STEPS, "takes sigmas in the place of a step count"),
    "UnCLIPPipeline": (_NO_STEPS, "takes three step counts, and starts from a vector"),
    "HeliosPyramidPipeline": (_NO_STEPS, "takes a step count for each size of its pyramid"),
    "StableDiffusionDiffEditPipeline": (
        "draws no initial noise",
        "starts from the latents of a picture, which were inverted before",
    ),
    "EasyAnimateControlPipeline": (
        "unexpected keyword argument 'text_encoder_index'",
        "fails by itself: it encodes prompts with an argument that there is not",
    ),
    "EasyAnimateInpaintPipeline": (
        "no attribute 'cache_mag_vae'",
        "fails by itself: it reads a setting that its autoencoder does not have",
    ),
    "StableUnCLIPPipeline": ("draws noise of shape", "draws the noise of its prior first, a vector, in three calls"),
    "KandinskyV22CombinedPipeline": _NO_ENCODER,
    "KandinskyV22Img2ImgCombinedPipeline": _NO_ENCODER,
    "KandinskyV22InpaintCombinedPipeline": _NO_ENCODER,
    "StableCascadeCombinedPipeline": _NO_ENCODER,
    "WuerstchenCombinedPipeline": _NO_ENCODER,
    "StableCascadePriorPipeline": _EMBEDDINGS,
    "WuerstchenPriorPipeline": _EMBEDDINGS,
    "LTXI2VLongMultiPromptPipeline": (
        "makes num_frames 3 where 5 was asked for",
        "gives videos with the channels before the frames, and takes one prompt a segment",
    ),
    "SemanticStableDiffusionPipeline": _WITHIN_CALL,
    "BriaFiboEditPipeline": ("valid edit JSON string", "takes JSON that describes an edit for its prompt"),
    "ChromaInpaintPipeline": (
        "has no attribute 'guidance_embeds'",
        "fails by itself: it reads a setting that its transformer does not have",
    ),
    "LongCatImageEditPipeline": (
        "object of type 'int' has no len",
        "fails by itself when a prompt is longer than it reads",
    ),
    "TextToVideoZeroPipeline": ("expected Tensor as element 0", "fails by itself without guidance"),
    "TextToVideoZeroSDXLPipeline": (
        "makes 2 pictures from 1 rows of latents",
        "gives the frames of a video as pictures of their own",
    ),
    "I2VGenXLPipeline": ("has no attribute 'text_model'", "fails by itself with transformers 5"),
    "MusicLDMPipeline": ("has no attribute 'to'", "fails by itself with transformers 5"),
    "AudioLDM2Pipeline": ("You need to specify either `text` or `text_target`", "fails by itself with transformers 5"),
    "OmniGenPipeline": ("OmniGenMultiModalProcessor", _TORCHVISION),
    "Cosmos2_5_PredictBasePipeline": _COSMOS,
    "Cosmos2_5_TransferPipeline": _COSMOS,
    "CosmosTextToWorldPipeline": _COSMOS,
    "CosmosVideoToWorldPipeline": _COSMOS,
    "Cosmos2TextToImagePipeline": _COSMOS,
    "Cosmos2VideoToWorldPipeline": _COSMOS,
}

MODULAR_REFUSED: dict[str, tuple[str, str]] = {
    "EchoModularPipeline": (_NO_STEPS, "takes no step count"),
    "HeliosPyramidModularPipeline": (_NO_STEPS, "takes a step count for each size of its pyramid"),
    "HeliosPyramidDistilledModularPipeline": (_NO_STEPS, "takes a step count for each size of its pyramid"),
}
"""The same of modular pipelines."""
