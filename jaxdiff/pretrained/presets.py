"""Configs of published models, for recipes and for single files."""

import dataclasses

from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.denoisers.flux import FLUX1, FluxConfig
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.denoisers.z_image import ZImageConfig
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_encoders.qwen3 import Qwen3Config, Qwen3TextEncoder

SD1 = UNet2DConditionConfig()
SD2 = UNet2DConditionConfig(
    heads=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
    upcast_attention=True,
)
XL = UNet2DConditionConfig(
    block_out_channels=(320, 640, 1280),
    transformer_layers=(0, 2, 10),
    middle_transformer_layers=10,
    heads=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    added_width=2816,
)
REFINER = UNet2DConditionConfig(
    block_out_channels=(384, 768, 1536, 1536),
    transformer_layers=(0, 4, 4, 0),
    middle_transformer_layers=4,
    heads=(6, 12, 24, 24),
    cross_attention_dim=1280,
    use_linear_projection=True,
    added_width=2560,
)
CLIP_L = ClipTextConfig()
# Without the last block, which is unused, as in diffusers' checkpoints.
OPENCLIP_H = ClipTextConfig(width=1024, depth=23, heads=16, activation="gelu")
OPENCLIP_G = ClipTextConfig(
    width=1280, depth=32, heads=20, activation="gelu", projection_dim=1280, end_id=49407
)

XL_SCALING_FACTOR = 0.13025  # of its autoencoder

FLUX1_DEV = dataclasses.replace(FLUX1, guidance_embedding=True)
KLEIN_4B = FluxConfig()
Z_IMAGE = ZImageConfig()

FLUX1_AUTOENCODER = AutoencoderConfig(
    latent_channels=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    sample_size=1024,
)
"""Z-Image's, too."""

KLEIN_4B_TEXT = Qwen3TextEncoder(model=Qwen3Config(), hidden_layers=(9, 18, 27))
Z_IMAGE_TEXT = Qwen3TextEncoder(model=Qwen3Config(), hidden_layers=(35,), thinking=True)
