"""Names of the diffusers folder layout: pipelines, their parts, and options that have one supported value."""

from __future__ import annotations

from typing import Any

PLAIN, INPAINTING, EDITING, UPSCALING, XL, XL_INPAINTING, XL_EDITING, XL_REFINER, SUPER_RESOLUTION = (
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "LDMSuperResolutionPipeline",
)
INDEX_FILE = "model_index.json"
ONE_ENCODER = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}
TWO_ENCODERS = ONE_ENCODER | {
    "text_encoder_2": "CLIPTextModelWithProjection",
    "tokenizer_2": "CLIPTokenizer",
}
PIPELINES = {  # pipeline -> the folder of each part, and its class
    PLAIN: ONE_ENCODER,
    INPAINTING: ONE_ENCODER,
    EDITING: ONE_ENCODER,
    UPSCALING: ONE_ENCODER,
    XL: TWO_ENCODERS,
    XL_INPAINTING: TWO_ENCODERS,
    XL_EDITING: TWO_ENCODERS,
    XL_REFINER: {
        part: kind for part, kind in TWO_ENCODERS.items() if part not in ("text_encoder", "tokenizer")
    },
    SUPER_RESOLUTION: {"unet": "UNet2DModel", "vqvae": "AutoencoderKL"},
}
# Pipelines that use the networks of another one in another way. Parts of their own are not used. Those of
# SDXL with an aesthetic score have the refiner's networks, see read_index().
SAME_NETWORKS = {
    **dict.fromkeys(
        (
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionPipelineSafe",
            "StableDiffusionSAGPipeline",
            "StableDiffusionPAGPipeline",
            "StableDiffusionPAGImg2ImgPipeline",
            "StableDiffusionPanoramaPipeline",
            "StableDiffusionAttendAndExcitePipeline",
            "StableDiffusionDiffEditPipeline",
            "StableDiffusionKDiffusionPipeline",
            "StableDiffusionAdapterPipeline",
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetPAGPipeline",
            "LatentConsistencyModelPipeline",
            "LatentConsistencyModelImg2ImgPipeline",
        ),
        PLAIN,
    ),
    **dict.fromkeys(
        (
            "StableDiffusionInpaintPipelineLegacy",
            "StableDiffusionPAGInpaintPipeline",
            "StableDiffusionControlNetInpaintPipeline",
            "StableDiffusionControlNetPAGInpaintPipeline",
        ),
        INPAINTING,
    ),
    **dict.fromkeys(
        (
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLPAGPipeline",
            "StableDiffusionXLPAGImg2ImgPipeline",
            "StableDiffusionXLAdapterPipeline",
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetUnionPipeline",
            "StableDiffusionXLControlNetPAGPipeline",
            "StableDiffusionXLKDiffusionPipeline",
        ),
        XL,
    ),
    **dict.fromkeys(
        (
            "StableDiffusionXLPAGInpaintPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
            "StableDiffusionXLControlNetUnionInpaintPipeline",
        ),
        XL_INPAINTING,
    ),
}
TEXT_ENCODERS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
LIBRARIES = dict.fromkeys((*TEXT_ENCODERS, *TOKENIZERS), "transformers")  # of other parts: diffusers
UNUSED_PARTS = {  # optional parts of a pipeline, which are written as absent
    PLAIN: ("feature_extractor", "image_encoder", "safety_checker"),
    INPAINTING: ("feature_extractor", "image_encoder", "safety_checker"),
    EDITING: ("feature_extractor", "image_encoder", "safety_checker"),
    UPSCALING: ("feature_extractor", "safety_checker", "watermarker"),
    XL: ("feature_extractor", "image_encoder"),
    XL_INPAINTING: ("feature_extractor", "image_encoder"),
    XL_EDITING: (),
    XL_REFINER: ("feature_extractor", "image_encoder", "text_encoder", "tokenizer"),
    SUPER_RESOLUTION: (),
}
SCHEDULER = "scheduler"
NOISE_SCHEDULER = "low_res_scheduler"  # for the noise added to low-resolution images
ADDED_KEY, SIZE_KEY = "projection_class_embeddings_input_dim", "addition_time_embed_dim"

# Options that change a network's results, and their supported values. The first value is the default for a
# configuration without the option.
Accepted = dict[str, tuple[Any, ...]]
UNET_FIXED: Accepted = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "mid_block_only_cross_attention": (None, False),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
}
VAE_FIXED: Accepted = {
    "act_fn": ("silu", "swish"),
    "shift_factor": (None, 0),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True, False),
}
PLAIN_UNET_FIXED: Accepted = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "resnet_time_scale_shift": ("default",),
    "add_attention": (False,),
    "class_embed_type": (None,),
}
TEXT_FIXED: Accepted = {"layer_norm_eps": (1e-5,), "hidden_act": ("quick_gelu", "gelu")}
SCHEDULER_FIXED: Accepted = {
    "beta_schedule": ("linear", "scaled_linear"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "original_inference_steps": (50,),  # these two: of LCM and TCD
    "timestep_scaling": (10.0,),
    "trained_betas": (None, []),
    "clip_sample": (False,),
    "thresholding": (False,),
}
HAS_ATTENTION = {
    "CrossAttnDownBlock2D": True,
    "DownBlock2D": False,
    "CrossAttnUpBlock2D": True,
    "UpBlock2D": False,
}
