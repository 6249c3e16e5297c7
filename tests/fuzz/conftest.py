"""A tiny Stable Diffusion, and its folder as diffusers has it."""

from pathlib import Path

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def unet_spec():
    """A Stable Diffusion with two blocks of width 8."""
    from jaxdiff.diffusion.schedules import ScaledLinear
    from jaxdiff.diffusion.time_grids import TrainStepGrid
    from jaxdiff.models.autoencoders.kl import AutoencoderConfig
    from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
    from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
    from jaxdiff.models.text_encoders.clip import ClipTextConfig
    from jaxdiff.models.text_to_image import TextToImage
    from jaxdiff.sampling.sampler import Sampler
    from jaxdiff.sampling.solvers_ode import DDIM

    text = ClipTextConfig(vocab_size=600, length=16, width=8, depth=2, heads=2)
    return TextToImage(
        denoiser=UNet2DConditionConfig(
            block_out_channels=(8, 8),
            layers_per_block=1,
            transformer_layers=(0, 1),
            middle_transformer_layers=1,
            heads=(2, 2),
            cross_attention_dim=8,
            norm_num_groups=4,
        ),
        conditioner=ClipConditioner(text=ClipTextEncoder(model=text), masked=False),
        autoencoder=AutoencoderConfig(
            block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4
        ),
        prediction="eps",
        schedule=ScaledLinear(),
        image_size=64,
        sampler=Sampler(solver=DDIM(), grid=TrainStepGrid(), init_noise="unit", num_steps=2),
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """An empty folder, in one that nothing else may be written to."""
    inside = tmp_path / "in"
    inside.mkdir()
    return inside


@pytest.fixture
def one_device(monkeypatch) -> None:
    """Pipelines see one of the simulated devices."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


@pytest.fixture(scope="session")
def models(tiny_bundle, unet_spec, tiny_recipe, tmp_path_factory) -> dict[str, Path]:
    """Folders of tiny models: exported, as diffusers has it, and of a run."""
    from jaxdiff.pretrained.bundle import Bundle, write_bundle
    from jaxdiff.pretrained.diffusers_folder import write_diffusers
    from jaxdiff.training.run import run_recipe

    root = tmp_path_factory.mktemp("models")
    write_bundle(root / "exported", tiny_bundle, dtype="float32")
    params = jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), unet_spec.abstract_params())
    write_diffusers(root / "diffusers", Bundle(unet_spec, params, tiny_bundle.tokenizers))
    run_recipe(tiny_recipe(steps=1), str(root / "run"))
    return {path.name: path for path in root.iterdir()}
