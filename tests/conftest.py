"""Shape annotations are checked while the tests run."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight simulated devices, for the tests of sharding; the others use the first.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()

from jaxtyping import install_import_hook

install_import_hook("jaxdiff", "beartype.beartype")

from collections.abc import Callable, Iterator

import jax
import pytest


@pytest.fixture(scope="session")
def tiny_recipe() -> Callable:
    """`tiny_recipe(steps=6)`: the smallest recipe of the real task, its train keys changed."""
    from jaxdiff.config import Config, TokenizerConfig, TrainConfig
    from jaxdiff.data.pipeline import DataConfig
    from jaxdiff.data.produce import Produce
    from jaxdiff.data.transforms import Transforms
    from jaxdiff.diffusion.curriculum import NoiseCurriculum
    from jaxdiff.diffusion.losses import Objective
    from jaxdiff.diffusion.schedules import RectifiedFlow
    from jaxdiff.models.clip import ClipTextConfig
    from jaxdiff.models.dit import DiTConfig
    from jaxdiff.training.diffusion import DiffusionTask, TextTower
    from jaxdiff.training.optimizer import AdamW

    text = ClipTextConfig(vocab_size=600, length=16, width=16, depth=1, heads=2)
    task = DiffusionTask(
        denoiser=DiTConfig(
            patch_size=8, width=32, depth=2, heads=2, text_width=16, pooled_width=16
        ),
        text=TextTower(model=text),
        objective=Objective(prediction="x0", loss_on="velocity", schedule=RectifiedFlow()),
        curriculum=NoiseCurriculum(steps_per_level=2),
    )

    def make(**train) -> Config:
        settings = {"steps": 6, "batch_size": 8, "checkpoint_every": 2, "log_every": 1} | train
        return Config(
            name="tiny",
            task=task,
            data=DataConfig(source=Produce(size=32, length=200), transforms=Transforms(size=32)),
            tokenizer=TokenizerConfig(vocab_size=600, length=16, records=50),
            optimizer=AdamW(learning_rate=1e-2),
            train=TrainConfig(**settings),
        )

    return make


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Programs compiled in this module, or by a process with this environment, compile once."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    jax.config.update("jax_compilation_cache_dir", folder)
    yield {"JAX_COMPILATION_CACHE_DIR": folder}
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_recipe):
    """The tiny recipe as if trained: random weights in which prompt, seed and time all matter."""
    import dataclasses

    import numpy as np

    from jaxdiff.data.tokenizer import Tokenizer
    from jaxdiff.model import Bundle
    from jaxdiff.models.layers import abstract_params, any_rngs
    from jaxdiff.sampling.settings import SamplingConfig
    from jaxdiff.sampling.solvers import DDIM

    sampling = SamplingConfig(solver=DDIM(), num_steps=3)
    config = dataclasses.replace(tiny_recipe(), sampling=sampling)
    rng = np.random.default_rng(0)

    def draw(leaf):
        scale = leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.5
        return rng.normal(0, scale, leaf.shape).astype(np.float32)

    params = jax.tree.map(draw, abstract_params(lambda: config.task.build(any_rngs())))
    captions = ["a small red pea", "a green tomato with a stem"]
    tokenizer = Tokenizer.train(captions, vocab_size=600, length=16)
    return Bundle(config, params, {}, tokenizer)
