"""Which guide models fit, and CLIP scores."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.diffusion.schedules import Cosine
from jaxdiff.distributed.replicas import local_mesh
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.layers import init_params
from jaxdiff.pipelines.auxiliary_models import clip_scores, load_guide
from jaxdiff.pretrained.bundle import Bundle, write_bundle


def test_a_model_of_the_same_kind_fits(tiny_bundle, tmp_path):
    write_bundle(tmp_path, tiny_bundle, "bfloat16")
    guide = load_guide(str(tmp_path), tiny_bundle, "float32", local_mesh())
    assert guide.spec == tiny_bundle.spec
    assert {x.dtype.name for x in jax.tree.leaves(guide.params)} == {"float32"}


def _changed(bundle, part=None, **changes):
    spec = dataclasses.replace(bundle.spec, **changes)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), spec.abstract_params())
    if part is not None:
        params["autoencoder"] = part
    return Bundle(spec, params, bundle.tokenizers)


@pytest.fixture(scope="module")
def in_latents(tiny_bundle):
    """The tiny model on latents of an autoencoder, and the same of another one."""
    model = AutoencoderConfig(
        latent_channels=3, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4
    )
    parts = [init_params(lambda rngs: model.build(rngs=rngs), nnx.Rngs(0))]
    parts.append(jax.tree.map(lambda x: 1.2 * x + 0.1, parts[0]))
    return [_changed(tiny_bundle, part, autoencoder=model) for part in parts]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantised_model_takes_its_own_kind(in_latents, tmp_path, kind):
    own = in_latents[0]
    quantized = own._replace(params=own.spec.quantize(own.params, kind))
    for i, bundle in enumerate(in_latents):
        write_bundle(tmp_path / str(i), bundle)
    load_guide(str(tmp_path / "0"), quantized, None, local_mesh())
    with pytest.raises(UserError, match="other latents than"):
        load_guide(str(tmp_path / "1"), quantized, None, local_mesh())


def test_models_of_another_kind_are_refused(tiny_bundle, in_latents, tmp_path):
    tokenizers = {"text": Tokenizer.train(["some other words"], vocab_size=600, length=16)}
    wrong = {
        "another tokenizer": (tiny_bundle._replace(tokenizers=tokenizers), tiny_bundle),
        "another schedule": (_changed(tiny_bundle, schedule=Cosine()), tiny_bundle),
        "other latents": (in_latents[0], tiny_bundle),
        "other latents than": (in_latents[1], in_latents[0]),
    }
    for i, (what, (guide, own)) in enumerate(wrong.items()):
        write_bundle(tmp_path / str(i), guide)
        with pytest.raises(UserError, match=what):
            load_guide(str(tmp_path / str(i)), own, None, local_mesh())
    with pytest.raises(UserError, match="expected a text-to-image model"):
        load_guide("shipped:produce_clip", tiny_bundle, None, local_mesh())


def test_the_shipped_clip_prefers_what_the_prompt_says():
    """More images than one batch has: those of a batch do not matter to each other."""
    images = np.zeros((18, 64, 64, 3), np.uint8) + np.array([200, 30, 30], np.uint8)
    images[::2] = [60, 200, 60]
    prompts = ["a green pea", '"a green pea":1 "red":-1'] * 9
    scores = clip_scores("shipped:produce_clip", images, prompts)
    assert scores.shape == (18,)
    assert np.all(np.abs(scores) <= 1)
    assert scores[::2].min() > scores[1::2].max()
    np.testing.assert_allclose(scores[::2], scores[0], atol=1e-6)
    np.testing.assert_allclose(scores[1::2], scores[1], atol=1e-6)
