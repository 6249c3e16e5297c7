"""A run whose text encoder is a language model: masks reach the step, and it loads again."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxdiff
from jaxdiff.benchmark import synthetic
from jaxdiff.distributed.mesh import make_mesh
from jaxdiff.models.conditioners.flux2 import Flux2Conditioner
from jaxdiff.models.denoisers.flux import FluxConfig
from jaxdiff.models.text_encoders.qwen3 import Qwen3Config, Qwen3TextEncoder
from jaxdiff.training.loop import train

pytestmark = pytest.mark.slow

QWEN = Qwen3TextEncoder(
    model=Qwen3Config(
        vocab_size=600, width=16, depth=3, heads=2, kv_heads=1, head_dim=8, mlp_width=16
    ),
    hidden_layers=(1, 2),
    max_length=16,
)
FLUX = FluxConfig(
    channels=3,
    patch_size=8,
    heads=2,
    head_width=16,
    rope_axes=(4, 4, 4, 4),
    double_depth=1,
    single_depth=1,
    text_width=QWEN.joined_width,
)


@pytest.mark.parametrize("guided", [False, True])
def test_a_run_from_scratch(tiny_recipe, tmp_path, guided):
    """A network that reads the guidance scale trains with one, too."""
    config = tiny_recipe(steps=2)
    denoiser = dataclasses.replace(FLUX, guidance_embedding=guided)
    model = dataclasses.replace(
        config.task.model, denoiser=denoiser, conditioner=Flux2Conditioner(text=QWEN)
    )
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, model=model))
    batch = synthetic.random_batch(config, make_mesh(config.mesh))
    assert batch["text"].masks["text"].all()
    assert not batch["text"].absent.any()

    out = tmp_path / "run"
    train(config, out)
    pipe = jaxdiff.load(out)
    assert pipe.spec.conditioner == model.conditioner
    layers = {x.shape[0] for x in jax.tree.leaves(pipe.params["text_encoders"]["text"]["blocks"])}
    assert layers == {2}
    images = pipe(["a pea", "a lemon"], seeds=[0, 0])
    assert images.shape == (2, 32, 32, 3)
    assert not np.array_equal(*images)
    assert pipe.truncated("a pea " * 20)
