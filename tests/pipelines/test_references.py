"""Reference images, distilled models and the hand-off between two models."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from jaxdiff.diffusion.time_grids import FlowGrid
from jaxdiff.diffusion.time_shifts import TokenShift
from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.flux import FluxConfig
from jaxdiff.pipelines.input_images import InitImage, References, fit_reference
from jaxdiff.pipelines.inputs import SampleRequest
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.program import compiled_sampler
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_ode import DDIM, Euler

PROMPTS = ["a small red pea", "a green tomato with a stem"]
FLUX = FluxConfig(
    channels=3,
    patch_size=8,
    heads=2,
    head_width=16,
    double_depth=1,
    single_depth=1,
    text_width=16,
    time_width=16,
    rope_axes=(4, 4, 4, 4),
    max_references=2,
)


def flux_pipeline(tiny_bundle, **changes):
    """A pipeline of a tiny FLUX.2 on pixels."""
    sampler = Sampler(solver=Euler(), grid=FlowGrid(token_shift=TokenShift()), num_steps=3)
    spec = dataclasses.replace(
        tiny_bundle.spec,
        denoiser=dataclasses.replace(FLUX, **changes.pop("denoiser", {})),
        prediction="velocity",
        sampler=dataclasses.replace(sampler, **changes),
    )
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(spec.abstract_params())
    random = [
        rng.normal(0, x.shape[-2] ** -0.5 if x.ndim > 1 else 0.5, x.shape).astype(np.float32)
        for x in leaves
    ]
    return Pipeline(Bundle(spec, jax.tree.unflatten(tree, random), tiny_bundle.tokenizers))


@pytest.fixture(scope="module")
def flux(tiny_bundle):
    return flux_pipeline(tiny_bundle)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(1)
    sizes = ((64, 72), (80, 64), (64, 72))
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def test_every_reference_and_their_order_matter(flux, pictures):
    options = {"seeds": 1, "size": (32, 32), "output": "float"}
    a, b, c = pictures
    plain = flux(PROMPTS[0], **options)
    one = flux(PROMPTS[0], init=References(images=[a]), **options)
    two = flux(PROMPTS[0], init=References(images=[a, b]), **options)
    turned = flux(PROMPTS[0], init=References(images=[b, a]), **options)
    other = flux(PROMPTS[0], init=References(images=[c]), **options)
    images = [plain, one, two, turned, other]
    for i, image in enumerate(images):
        for further in images[:i]:
            assert np.abs(image - further).max() > 1e-3


def test_other_references_of_a_size_do_not_recompile(flux, pictures):
    call = flux.prepare(SampleRequest.of(prompts=PROMPTS[0], size=(32, 32)))
    sizes = []
    for image in (pictures[0], pictures[2]):
        flux(PROMPTS[0], init=References(images=[image]), size=(32, 32))
        sizes.append(compiled_sampler(call.spec)._cache_size())
    assert sizes[0] == sizes[1] > 0


def test_references_are_encoded_by_the_mode_of_the_autoencoder(flux, pictures, vae_modes):
    init = References(images=[pictures[0]])
    flux(PROMPTS[0], init=init, size=(32, 32), sampler=Sampler(vae_mode="slicing"))
    assert vae_modes["encode"] == {"slicing"}


def test_an_image_has_its_own_references(flux, pictures):
    """One for all prompts, or one for each, of one size."""
    a, _, c = pictures
    options = {"seeds": [1, 2], "size": (32, 32), "output": "float", "batch_size": 2}
    each = flux(PROMPTS, init=References(images=[np.stack([a, c])]), **options)
    for i, image in enumerate((a, c)):
        alone = flux(PROMPTS, init=References(images=[image]), **options)
        np.testing.assert_array_equal(each[i], alone[i])


def test_the_size_is_that_of_the_first_reference_unless_it_is_given(flux, pictures):
    assert flux(PROMPTS[0], init=References(images=pictures[:2])).shape == (1, 64, 72, 3)
    image = Image.fromarray(pictures[0])
    np.testing.assert_array_equal(
        flux(PROMPTS[0], init=References(images=image)),
        flux(PROMPTS[0], init=References(images=[pictures[0]])),
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "There are 0 reference images: expected 1 to 2"),
        ([np.zeros((64, 64, 3), np.uint8)] * 3, "There are 3 reference images: expected 1 to 2"),
        ([np.zeros((64, 32, 3), np.uint8)], "is 32x64: expected sides of at least 64"),
        ([np.zeros((64, 1000, 3), np.uint8)], "is 1000x64: .* at most 8 times"),
        (["a.png"], "A reference image is a str: expected an array"),
        ([np.zeros((2, 64, 64, 3), np.uint8)], "A reference image has 2 for 1 prompts"),
    ],
)
def test_references_that_the_model_does_not_take_are_refused(flux, images, message):
    with pytest.raises(UserError, match=message):
        flux(PROMPTS[0], init=References(images=images))


def test_references_are_refused_by_models_without_them(pipeline, pictures):
    with pytest.raises(UserError, match="tiny reads no reference images: expected none"):
        pipeline(PROMPTS[0], init=References(images=pictures[:1]))


@pytest.mark.parametrize("size", [(2000, 1500), (1024, 1024), (1031, 1020), (100, 64)])
def test_a_reference_has_at_most_a_megapixel_and_sides_of_the_multiple(size):
    width, height = size
    image = np.zeros((1, height, width, 3), np.uint8)
    fitted = fit_reference(image, 16)
    assert fitted.shape[1] % 16 == fitted.shape[2] % 16 == 0
    assert fitted.shape[1] * fitted.shape[2] <= 1024 * 1024
    assert fitted.shape[2] / fitted.shape[1] == pytest.approx(width / height, rel=0.3)


def test_a_cropped_reference_keeps_its_centre():
    image = np.arange(66 * 70, dtype=np.uint32).reshape(1, 66, 70, 1).astype(np.uint8)
    image = image.repeat(3, -1)
    np.testing.assert_array_equal(fit_reference(image, 16), image[:, 1:65, 3:67])


def test_the_grid_depends_on_the_size_of_the_image(tiny_bundle):
    """Twice the tokens of the base have a larger shift: other noise levels, other images."""
    shift = TokenShift(base_tokens=16, most_tokens=32)
    constant = FlowGrid(shift=float(np.exp(0.5)))
    for size, is_equal in (((32, 32), True), ((64, 32), False)):
        images = [
            flux_pipeline(tiny_bundle, grid=grid)(PROMPTS[0], seeds=0, size=size, output="float")
            for grid in (FlowGrid(token_shift=shift), constant)
        ]
        assert (np.abs(images[0] - images[1]).max() < 1e-4) == is_equal


def test_a_guidance_embedding_replaces_classifier_free_guidance(tiny_bundle):
    pipe = flux_pipeline(tiny_bundle, denoiser={"guidance_embedding": True})
    options = {"seeds": 1, "output": "float"}
    images = [pipe(PROMPTS[0], guidance_scale=scale, **options) for scale in (1.0, 3.5)]
    assert np.abs(images[0] - images[1]).max() > 1e-4
    negative = pipe(PROMPTS[0], PROMPTS[1], guidance_scale=3.5, **options)
    np.testing.assert_array_equal(negative, images[1])
    true = Guidance(true_cfg_scale=2.0)
    guided = pipe(PROMPTS[0], PROMPTS[1], guidance_scale=3.5, guidance=true, **options)
    assert np.abs(guided - images[1]).max() > 1e-4
    same = Guidance(true_cfg_scale=1.0)
    unguided = pipe(PROMPTS[0], PROMPTS[1], guidance_scale=3.5, guidance=same, **options)
    np.testing.assert_allclose(unguided, images[1], atol=1e-5)


def test_a_distilled_model_takes_no_guidance(tiny_bundle, flux):
    distilled = Guidance(distilled=True)
    pipe = flux_pipeline(tiny_bundle, guidance=distilled, guidance_scale=1.0)
    options = {"seeds": 1, "output": "float"}
    image = pipe(PROMPTS[0], PROMPTS[1], **options)
    np.testing.assert_allclose(image, flux(PROMPTS[0], guidance_scale=1.0, **options), atol=1e-5)
    with pytest.raises(UserError, match=r"guidance_scale is 4, but tiny is distilled.*expected 1"):
        pipe(PROMPTS[0], guidance_scale=4.0)
    guided = pipe(PROMPTS[0], PROMPTS[1], guidance=Guidance(true_cfg_scale=4.0), **options)
    expected = flux(PROMPTS[0], PROMPTS[1], guidance_scale=4.0, **options)
    np.testing.assert_allclose(guided, expected, atol=1e-4)
    with pytest.raises(UserError, match="true_cfg_scale is 4, but tiny is not distilled"):
        flux(PROMPTS[0], guidance=Guidance(true_cfg_scale=4.0))


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_two_calls_of_one_model_are_one(pipeline, share):
    options = {"seeds": [1, 2], "num_steps": [8, 5], "output": "latents"}
    first = pipeline(PROMPTS, sampler=interval(0, share), **options)
    second = pipeline(PROMPTS, sampler=interval(share, 1), latents=first, **options)
    whole = pipeline(PROMPTS, sampler=interval(0, 1), **options)
    np.testing.assert_allclose(second, whole, atol=1e-5)
    assert np.abs(first - whole).max() > 1e-2


def interval(low, high):
    return Sampler(solver=DDIM(), denoising_interval=(low, high))


@pytest.mark.parametrize(
    ("low", "high", "options", "message"),
    [
        (0, 0.5, {"output": "float"}, 'expected 1, or output="latents"'),
        (0.5, 1, {}, "starts at 0.5: expected the latents of a call"),
        (
            0.5,
            1,
            {"init": InitImage(image=np.zeros((32, 32, 3), np.uint8))},
            "and no init image",
        ),
        (0, 0, {"output": "latents"}, "none of 3 steps starts"),
    ],
)
def test_intervals_that_contradict_the_call_are_refused(pipeline, low, high, options, message):
    with pytest.raises(UserError, match=message):
        pipeline(PROMPTS[0], sampler=interval(low, high), num_steps=3, **options)
