"""Adapters on a whole model: of the denoiser and of its text encoder."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
from jaxdiff.models.denoisers.dit import DiTConfig
from jaxdiff.models.lora import Change, Factors
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines import lora
from jaxdiff.pipelines.lora import adapters_of, attach, detach, merge, scaled
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pretrained.bundle import Bundle, check_params

QUERY = ("blocks", "attention", "q")
MLP = ("blocks", "mlp_in")
TEXT = ClipTextConfig(vocab_size=600, length=16, width=32, depth=2, heads=2)
SPEC = TextToImage(
    name="small",
    denoiser=DiTConfig(width=32, depth=2, heads=2, text_width=32, pooled_width=32),
    conditioner=ClipConditioner(text=ClipTextEncoder(model=TEXT)),
    prediction="x0",
    schedule=RectifiedFlow(),
    image_size=16,
)


def normal(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    params = jax.tree.map(lambda x: normal(*x.shape), SPEC.abstract_params())
    return Bundle(SPEC, params, {})


def some(bundle, rank):
    """Adapters of the denoiser's queries and, in the text encoder, of the MLP's first layer."""
    text = bundle.params["text_encoders"]["text"]
    kernels = {
        ("denoiser", QUERY): bundle.params["denoiser"]["blocks"]["attention"]["q"]["kernel"],
        ("text", MLP): text["blocks"]["mlp_in"]["kernel"],
    }
    return {
        part: {
            path: Factors(
                normal(*kernel.shape[:2], rank), normal(len(kernel), rank, kernel.shape[2])
            )
        }
        for (part, path), kernel in kernels.items()
    }


def assert_same(a, b):
    assert a.spec == b.spec
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a.params, b.params
    )


def assert_same_change(a, b):
    assert set(a) == set(b)
    for part in a:
        assert set(a[part]) == set(b[part])
        for path, pair in a[part].items():
            np.testing.assert_allclose(pair.product, b[part][path].product, rtol=1e-4, atol=1e-4)


def test_attached_adapters_fit_the_model_and_come_off(bundle):
    there = some(bundle, rank=2)
    model = attach(bundle, there)
    check_params(model.params, model.spec, "model")
    assert set(model.params["adapters"]) == {"denoiser", "text_encoders"}
    assert_same_change(adapters_of(model), there)
    assert_same(detach(model), bundle)
    assert adapters_of(bundle) == {}
    assert attach(bundle, {}) is bundle


def test_several_add_up_in_any_order(bundle):
    one, two = some(bundle, rank=2), scaled(some(bundle, rank=3), 0.5)
    del two["text"]
    both = attach(attach(bundle, one), two)
    other = attach(attach(bundle, two), one)
    assert adapters_of(both)["denoiser"][QUERY].down.shape[-1] == 5
    assert_same_change(adapters_of(both), adapters_of(other))
    at_once = merge(detach(both), adapters_of(both))
    assert_same(at_once, merge(merge(detach(both), one), two))


def test_other_scales_of_several_compile_nothing(tiny_bundle, compilations):
    pipe = Pipeline(tiny_bundle, devices=jax.devices()[:1])

    def image(first, second):
        model = pipe.bundle
        for rank, scale in ((2, first), (3, second)):
            model = attach(model, scaled(some(tiny_bundle, rank), scale))
        return pipe.with_bundle(model)("a small red pea", num_steps=1, output="float")

    before = image(0.01, 0.02)
    del compilations[:]
    assert np.abs(image(0.03, 0.01) - before).max() > 1e-3
    assert not compilations


def test_adapters_of_one_part_have_one_rank(bundle):
    one = some(bundle, rank=2)["denoiser"][QUERY]
    three = some(bundle, rank=3)["denoiser"][QUERY]
    key = ("blocks", "attention", "k")
    there = {"denoiser": {QUERY: one, key: three}}
    found = adapters_of(attach(bundle, there))
    assert {pair.down.shape[-1] for pair in found["denoiser"].values()} == {3}
    assert_same_change(found, there)


def test_one_is_merged_beside_another(bundle):
    one, two = some(bundle, rank=2), some(bundle, rank=1)
    model = merge(attach(bundle, one), two)
    assert_same_change(adapters_of(model), one)
    assert_same(detach(model), merge(bundle, two))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_is_finite(pipeline, scale, tmp_path):
    with pytest.raises(UserError, match=f"is {scale}: expected a finite number"):
        lora.apply_lora(pipeline, tmp_path / "style.safetensors", scale=scale)


def test_what_is_not_of_low_rank_is_merged_only(pipeline, monkeypatch):
    path = (*QUERY, "kernel")
    change = Change(kind="LoKr", apply=lambda value, scale: value + scale)
    monkeypatch.setattr(lora, "read_lora", lambda file, spec: {"denoiser": {path: change}})
    with pytest.raises(UserError, match="has LoKr, which is not of low rank: expected merge=True"):
        lora.apply_lora(pipeline, "style.safetensors")
    found = lora.apply_lora(pipeline, "style.safetensors", scale=3, merge=True)
    old, new = (
        x.params["denoiser"]["blocks"]["attention"]["q"]["kernel"] for x in (pipeline, found)
    )
    np.testing.assert_allclose(np.asarray(new) - np.asarray(old), 3, rtol=1e-5)


def test_a_file_of_another_model_is_refused(pipeline, tmp_path):
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "style.safetensors")
    with pytest.raises(UserError, match="expected Stable Diffusion's U-Net"):
        lora.apply_lora(pipeline, tmp_path / "style.safetensors")
