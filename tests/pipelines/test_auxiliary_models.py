"""Which weaker models fit, and how well a CLIP finds that images do."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jaxdiff.models.components import Latents

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.diffusion.schedules import Cosine
from jaxdiff.distributed.replicate import local_mesh
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.layers import abstract_params, any_rngs
from jaxdiff.pipelines.auxiliary_models import clip_scores, read_weak
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.load import write_bundle


def test_a_model_of_the_same_kind_fits(tiny_bundle, tmp_path):
    write_bundle(tmp_path, tiny_bundle, "bfloat16")
    weak = read_weak(str(tmp_path), tiny_bundle, "float32", local_mesh())
    assert weak.task == tiny_bundle.config.task
    assert {x.dtype.name for x in jax.tree.leaves(weak.weights)} == {"float32"}


def _with_task(bundle, frozen=None, **changes):
    task = dataclasses.replace(bundle.config.task, **changes)
    config = dataclasses.replace(bundle.config, task=task)
    params = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float32), abstract_params(lambda: task.build(any_rngs()))
    )
    return Bundle(config, params, frozen or {}, bundle.tokenizer)


@pytest.fixture(scope="module")
def in_latents(tiny_bundle):
    """The tiny model on latents of an autoencoder, and the same of another one."""
    model = AutoencoderConfig(
        latent_channels=3, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4
    )
    latents = Latents(model=model, pretrained="somewhere")
    parts = [nnx.to_pure_dict(nnx.state(latents.build(nnx.Rngs(0))))]
    parts.append(jax.tree.map(lambda x: 1.2 * x + 0.1, parts[0]))
    return [_with_task(tiny_bundle, {"autoencoder": part}, latents=latents) for part in parts]


def test_models_of_another_kind_are_refused(tiny_bundle, in_latents, tmp_path):
    task = tiny_bundle.config.task
    other_words = Tokenizer.train(["some other words"], vocab_size=600, length=16)
    schedule = dataclasses.replace(task.objective, schedule=Cosine())
    wrong = {
        "another tokenizer": (tiny_bundle._replace(tokenizer=other_words), tiny_bundle),
        "another schedule": (_with_task(tiny_bundle, objective=schedule), tiny_bundle),
        "other latents": (in_latents[0], tiny_bundle),
        "other latents than": (in_latents[1], in_latents[0]),
    }
    for i, (what, (weak, strong)) in enumerate(wrong.items()):
        write_bundle(tmp_path / str(i), weak)
        with pytest.raises(UserError, match=what):
            read_weak(str(tmp_path / str(i)), strong, None, local_mesh())
    with pytest.raises(UserError, match="is no text-to-image model"):
        read_weak("shipped:produce_clip", tiny_bundle, None, local_mesh())


def test_the_shipped_clip_prefers_what_the_prompt_says():
    """More images than it looks at at a time: those of a batch do not matter to each other."""
    images = np.zeros((18, 64, 64, 3), np.uint8) + np.array([200, 30, 30], np.uint8)
    images[::2] = [60, 200, 60]
    prompts = ["a green pea", '"a green pea":1 "red":-1'] * 9
    scores = clip_scores("shipped:produce_clip", images, prompts)
    assert scores.shape == (18,)
    assert np.all(np.abs(scores) <= 1)
    assert scores[::2].min() > scores[1::2].max()
    np.testing.assert_allclose(scores[::2], scores[0], atol=1e-6)
    np.testing.assert_allclose(scores[1::2], scores[1], atol=1e-6)
