"""Features and their statistics: equal on any devices, read from files, and scored."""

import dataclasses
import weakref

import jax
import numpy as np
import pytest
from etils import epath

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.loader import DataConfig
from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.errors import UserError
from jaxdiff.evaluation import extraction, feature_distance, features, statistics
from jaxdiff.evaluation.distances import moments_of
from jaxdiff.evaluation.evaluator import EvalContext, Generation
from jaxdiff.evaluation.extraction import image_features
from jaxdiff.evaluation.feature_distance import FeatureDistance, measure
from jaxdiff.evaluation.features import ClipFeatures, clip_network
from jaxdiff.evaluation.image_sets import DataImages, ImageArray, ImageFiles
from jaxdiff.evaluation.reference import open_reference, set_statistics
from jaxdiff.evaluation.statistics import collect, write_statistics
from jaxdiff.io.images import save_png
from jaxdiff.models.layers import any_rngs, init_params
from jaxdiff.models.text_encoders.clip import (
    ClipConfig,
    ClipTextConfig,
    ClipVision,
    ClipVisionConfig,
)
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance
from jaxdiff.sampling.guidance.guidance import Guidance

SIZES = {"width": 16, "depth": 1, "heads": 2, "projection_dim": 8}
SPEC = ClipConfig(
    text=ClipTextConfig(**SIZES), vision=ClipVisionConfig(image_size=16, patch_size=8, **SIZES)
)


def tiny_network(devices=None):
    """A CLIP of 8 features with random weights, on these devices."""
    params = init_params(lambda rngs: ClipVision(SPEC.vision, rngs=rngs), any_rngs())
    with pytest.MonkeyPatch.context() as patch:
        if devices:
            patch.setattr(features, "local_mesh", lambda: _mesh(devices))
        return clip_network(SPEC, params, "tiny")


_mesh = features.local_mesh


@pytest.fixture(scope="module")
def network():
    return tiny_network(jax.devices()[:1])


class Weak(np.ndarray):
    """An array that weak references may refer to, and that is equal to itself alone."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def images(count: int, seed: int = 0) -> np.ndarray:
    """Squares of random colours and sizes."""
    rng = np.random.default_rng(seed)
    made = np.zeros((count, 20, 20, 3), np.uint8)
    for image in made:
        a, b, c, d = rng.integers(0, 20, 4)
        image[...] = rng.integers(0, 256, 3)
        image[min(a, b) : max(a, b), min(c, d) : max(c, d)] = rng.integers(0, 256, 3)
    return made


@pytest.mark.slow
def test_2000_images_have_equal_statistics_on_1_and_8_devices(network):
    pixels = ImageArray(images(2000), "squares")
    one, eight = (set_statistics(x, pixels) for x in (network, tiny_network(jax.devices())))
    assert one.count == eight.count == 2000
    assert one.fingerprint == eight.fingerprint
    np.testing.assert_allclose(one.moments.covariance, np.cov(one.features.T), rtol=1e-6)
    np.testing.assert_allclose(one.moments.mean, one.features.mean(0), rtol=1e-4)


def test_collected_moments_do_not_depend_on_an_offset():
    x = np.random.default_rng(0).normal(size=(3000, 5)).astype(np.float32)
    found = collect([x[:1024] + 1e4, x[1024:1500] + 1e4, x[1500:] + 1e4], {}, "x", 3000)
    exact = moments_of(x + np.float32(1e4))
    np.testing.assert_allclose(found.moments.covariance, exact.covariance, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.moments.mean, exact.mean, rtol=1e-12)


def test_kept_features_are_spread_evenly(monkeypatch):
    monkeypatch.setattr(statistics, "FEATURES_KEPT", 10)
    x = np.arange(100, dtype=np.float32)[:, None]
    found = collect([x[:33], x[33:]], {}, "x", 100)
    assert found.features[:, 0].tolist() == list(range(0, 100, 10))
    assert found.moments.mean == 49.5


def test_unusable_records_are_left_out(network, monkeypatch):
    whole = Produce.__getitem__

    def spoiled(self, index):
        if index in (0, 3):
            raise RecordError("unreadable")
        return whole(self, index)

    monkeypatch.setattr(Produce, "__getitem__", spoiled)
    data = DataConfig(source=Produce(size=32, length=10), transforms=Transforms(size=32))
    chosen = DataImages(data, 5)  # records 0, 2, 4, 6, 8
    assert len(chosen.captions()) == 4
    assert np.concatenate(list(image_features(network, chosen))).shape == (4, 8)


def test_a_stopped_extraction_resumes(network, monkeypatch, tmp_path):
    folder = epath.Path(tmp_path)
    monkeypatch.setattr(extraction, "PART", 4)
    pixels = ImageArray(images(10), "squares")
    expected = np.concatenate(list(image_features(network, pixels)))
    next(image_features(network, pixels, folder))
    calls = []

    watched = network._replace(embed=lambda x: calls.append(len(x)) or network.embed(x))
    found = np.concatenate(list(image_features(watched, pixels, folder)))
    np.testing.assert_array_equal(found, expected)
    assert len(calls) == 2  # of three parts, the first was saved
    other = ImageArray(images(10, seed=1), "squares")
    assert not np.array_equal(np.concatenate(list(image_features(network, other, folder))), found)
    next(folder.glob("part_*")).write_bytes(b"damaged")
    found = np.concatenate(list(image_features(network, pixels, folder)))
    np.testing.assert_array_equal(found, expected)
    extraction.remove_parts(folder)
    assert not folder.exists()


def test_few_images_of_a_set_are_in_memory_at_a_time(network):
    alive, most = weakref.WeakSet(), []

    class Counted:
        name = fingerprint = "counted"

        def __len__(self):
            return 100

        def __getitem__(self, index, /):
            if index == 3:
                raise RecordError("unreadable")
            image = images(1)[0].view(Weak)
            alive.add(image)
            most.append(len(alive))
            return image

    [found] = image_features(network, Counted())
    assert found.shape == (99, 8)
    assert max(most) <= 3 * features._THREADS


def test_features_that_cannot_be_saved_are_computed(network, tmp_path):
    pixels = ImageArray(images(3), "squares")
    (tmp_path / "file").write_text("no folder")
    found = list(image_features(network, pixels, epath.Path(tmp_path) / "file"))
    np.testing.assert_array_equal(found, list(image_features(network, pixels)))


def test_statistics_are_the_same_from_a_file_a_folder_and_an_archive(network, tmp_path):
    pixels = images(17)
    expected = set_statistics(network, ImageArray(pixels, "squares"))

    def read(name):
        return open_reference(str(tmp_path / name)).statistics(network)

    write_statistics(tmp_path / "a.safetensors", expected)
    stored = read("a.safetensors")
    assert (stored.fingerprint, stored.data) == (expected.fingerprint, "squares")
    for i, image in enumerate(pixels):
        save_png(tmp_path / "folder" / "below" / f"{i:02d}.png", image)
    assert read("folder").fingerprint == expected.fingerprint
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    assert read("images.npz").fingerprint == expected.fingerprint
    mean, covariance = expected.moments
    np.savez(tmp_path / "moments.npz", mu=mean, sigma=covariance)
    moments = read("moments.npz")
    assert moments.features is None
    report = measure(network, expected, moments)
    assert report.scalars.keys() == {"frechet_tiny", "frechet_infinity_tiny"}
    assert report.scalars["frechet_tiny"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="holds mean and covariance alone, and mmd needs features"):
        measure(network, expected, moments, ("mmd",))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.array([{}])}, "is not a readable .npz file"),
        ({"arr_0": np.zeros((2, 3))}, "arr_0 is float64"),
        ({"other": np.zeros(2)}, "has neither mu and sigma nor arr_0"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, "expected a square matrix"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "has features of 3 numbers and not 8"),
    ],
)
def test_archives_that_cannot_be_used_are_refused(network, tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_reference(str(tmp_path / "a.npz")).statistics(network)


def test_statistics_of_another_network_are_refused(network, tmp_path):
    found = set_statistics(network, ImageArray(images(12), "squares"))
    other = dataclasses.replace(found, network={**found.network, "weights": "others"})
    write_statistics(tmp_path / "a.safetensors", other)
    with pytest.raises(UserError, match="was computed with the weights others and not"):
        open_reference(str(tmp_path / "a.safetensors")).statistics(network)
    save_png(tmp_path / "b.safetensors", images(1)[0])
    with pytest.raises(UserError, match="is damaged"):
        open_reference(str(tmp_path / "b.safetensors")).statistics(network)


def test_few_images_have_a_frechet_distance_only_if_asked_for(network):
    few = set_statistics(network, ImageArray(images(8), "few"))
    with pytest.raises(UserError, match="frechet_tiny of 8 images says little"):
        measure(network, few, few, ("frechet",))
    asked = measure(network, few, few, ("frechet",), few=True)
    assert asked.scalars["frechet_tiny"] == pytest.approx(0, abs=1e-9)


def test_more_different_images_are_further_away(network):
    reference = set_statistics(network, ImageArray(images(60), "a"))
    like = measure(network, set_statistics(network, ImageArray(images(60, 1), "b")), reference)
    dark = ImageArray(images(60, 2) // 4, "c")
    unlike = measure(network, set_statistics(network, dark), reference)
    ends = ("frechet", "frechet_infinity", "kernel", "mmd")
    assert set(like.scalars) == {f"{x}_tiny" for x in (*ends, "precision", "recall")}
    for name in ends:
        assert unlike.scalars[f"{name}_tiny"] > like.scalars[f"{name}_tiny"]
    assert unlike.scalars["recall_tiny"] < like.scalars["recall_tiny"]
    about = like.provenance["mmd_tiny"]
    assert (about["images"], about["sigma"]) == (60, 10.0)
    assert about["reference"] == reference.fingerprint


def test_a_frechet_distance_is_extrapolated_or_refused(network):
    """Of 8 numbers: at least 17 images."""
    for count in (9, 16):
        found = set_statistics(network, ImageArray(images(count), "some"))
        with pytest.raises(UserError, match=f"of {count} images says little, .*more than 16"):
            measure(network, found, found, ("frechet",))
    found = set_statistics(network, ImageArray(images(17), "enough"))
    assert "frechet_infinity_tiny" in measure(network, found, found, ("frechet",)).scalars


@pytest.fixture
def context(tiny_bundle, tiny_recipe, tmp_path):
    data = dataclasses.replace(tiny_recipe().data, source=Produce(size=32, length=12))
    spec, params, tokenizers = tiny_bundle
    return EvalContext(0, spec, params, tokenizers, data, parts=epath.Path(tmp_path) / "parts")


def test_generated_images_do_not_depend_on_parts_and_resume(context, network, monkeypatch):
    monkeypatch.setattr(ClipFeatures, "load", lambda _: network)
    evaluator = FeatureDistance(samples=12, measures=("mmd", "precision_recall"))
    whole = evaluator.evaluate(dataclasses.replace(context, parts=None))
    monkeypatch.setattr(extraction, "PART", 5)
    generated = []
    generate = EvalContext.generate_share
    monkeypatch.setattr(
        EvalContext,
        "generate_share",
        lambda self, prompts, first: generated.append(first) or generate(self, prompts, first),
    )
    parts = evaluator.evaluate(context)
    assert generated == [0, 5, 10]
    assert parts.scalars.keys() == evaluator.figure_names()
    assert parts.scalars == whole.scalars
    sorted(context.parts.glob("part_*"))[0].unlink()
    assert evaluator.evaluate(context).scalars == whole.scalars
    assert len(generated) <= 4
    assert whole.provenance["mmd_tiny"]["prompts"] == parts.provenance["mmd_tiny"]["prompts"]


@pytest.mark.parametrize(
    "generation",
    [
        Generation(best_of=2, clip_model="mine"),
        Generation(arguments={"guidance": Guidance(clip=ClipGuidance(scale=1.0, model="mine"))}),
    ],
)
def test_saved_features_are_of_the_weights_of_the_clip(generation, context, network, monkeypatch):
    """Not of its name, under which there may be another one."""
    monkeypatch.setattr(EvalContext, "generate_share", lambda *_: images(2))
    context = dataclasses.replace(context, generation=generation)
    for weights in ("first", "second", "second"):
        clip = network._replace(provenance={"weights": weights})
        monkeypatch.setattr(extraction, "clip_score_network", lambda _, clip=clip: clip)
        list(extraction.generated_features(context, network, ["a", "b"]))
    assert len(list(context.parts.glob("part_*"))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 50}, "frechet_tiny of 7 images says little"),  # the reference has 7
        ({"reference": "moments.npz"}, "has features of 3 numbers and not 8"),
        ({"reference": "fit.npz", "measures": ("mmd",)}, "mmd needs features"),
        ({"reference": "none"}, "The reference .*none does not exist: expected a folder"),
        ({"reference": "notes.txt"}, "another kind of file: expected a folder"),
    ],
)
def test_comparisons_that_are_impossible_are_refused_before_any_image_is_generated(
    changes, message, context, network, tmp_path, monkeypatch
):
    monkeypatch.setattr(ClipFeatures, "load", lambda _: network)
    for i, image in enumerate(images(7)):
        save_png(tmp_path / "real" / f"{i}.png", image)
    np.savez(tmp_path / "moments.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "fit.npz", mu=np.zeros(8), sigma=np.eye(8))
    (tmp_path / "notes.txt").write_text("no images")
    reference = str(tmp_path / changes.get("reference", "real"))
    evaluator = FeatureDistance(**{**changes, "reference": reference})
    source = Produce(size=32, length=60)
    with pytest.raises(UserError, match=message):
        evaluator.check(context.spec, dataclasses.replace(context.data, source=source))


def test_the_size_of_the_data_limits_the_images(context, network, monkeypatch):
    monkeypatch.setattr(ClipFeatures, "load", lambda _: network)
    small = dataclasses.replace(context.data, source=Produce(size=32, length=8))
    with pytest.raises(UserError, match="frechet_tiny of 8 images says little"):
        FeatureDistance(samples=5000).check(context.spec, small)
    FeatureDistance(samples=5000, few=True).check(context.spec, small)
    large = dataclasses.replace(context.data, source=Produce(size=32, length=17))
    FeatureDistance(samples=5000).check(context.spec, large)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        ImageFiles(tmp_path / "none")
    with pytest.raises(UserError, match="contains no images"):
        ImageFiles(tmp_path)


def test_the_shipped_clip_needs_no_download_and_names_its_figures():
    network = ClipFeatures().load()
    assert network.name_of("frechet") == "frechet_shipped_produce_clip"
    assert network(images(3)).shape == (3, network.width) == (3, 128)
    assert feature_distance.FeatureDistance().network == ClipFeatures()
