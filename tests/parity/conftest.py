"""PyTorch works in one thread: more of them wait for each other while XLA's have work to do."""

import pytest

from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    pytest.importorskip("torch").set_num_threads(1)


@pytest.fixture(scope="session")
def small_unet() -> UNet2DConditionConfig:
    """A U-Net of Stable Diffusion's kind, of two levels."""
    return UNet2DConditionConfig(
        block_out_channels=(16, 32),
        layers_per_block=1,
        transformer_layers=(1, 0),
        heads=(2, 2),
        cross_attention_dim=16,
        norm_num_groups=8,
    )
