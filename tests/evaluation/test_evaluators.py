"""Evaluators: figures of true images and of noise, what they show, and what they refuse."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxdiff.data.bad_records import RecordError
from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.cached_latents import CachedLatents
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.openmoji import source as openmoji
from jaxdiff.datasets.openmoji.score import held_out_prompts
from jaxdiff.datasets.openmoji.source import OpenMoji
from jaxdiff.datasets.produce.rendering import render
from jaxdiff.datasets.produce.score import evaluation_scenes
from jaxdiff.datasets.produce.source import Produce, full_caption
from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.distributed.replicas import shard
from jaxdiff.errors import UserError
from jaxdiff.evaluation import clip_score, samples
from jaxdiff.evaluation import evaluator as interface
from jaxdiff.evaluation.clip_score import ClipScore
from jaxdiff.evaluation.evaluator import EvalContext, Generation
from jaxdiff.evaluation.features import FeatureNetwork
from jaxdiff.evaluation.openmoji import OpenMojiAccuracy
from jaxdiff.evaluation.produce import ProduceAccuracy
from jaxdiff.evaluation.samples import Reconstructions, SampleGrid
from jaxdiff.models.autoencoders.kl import AutoencoderConfig, Gaussian
from jaxdiff.pipelines.rerank import Ranked

COUNT = 6
COLUMNS = ("score", "ceiling", "chance")


@dataclasses.dataclass(frozen=True)
class Perfect(EvalContext):
    """A context whose model generates the true image of each prompt."""

    images: dict = dataclasses.field(default_factory=dict)

    def generate_share(self, prompts, first=0):
        return np.stack([self.images[prompt] for prompt in prompts])


@pytest.fixture(scope="module")
def context(tiny_recipe):
    """`context(source, size, images)`: of a model for images of that size."""

    def make(source, size: int = 64, images=None, **changes) -> Perfect:
        spec = dataclasses.replace(tiny_recipe().task.model, image_size=size)
        data = DataConfig(source=Produce(), transforms=Transforms(size=size))
        object.__setattr__(data, "source", source)  # which may be none that recipes know
        return Perfect(0, changes.get("spec", spec), {}, {}, data, images=images or {})

    return make


@pytest.fixture(scope="module")
def produce(context) -> Perfect:
    images = {
        full_caption(scene): render(scene, np.random.default_rng(i))
        for split, kind in (("held_out", "single"), ("train", "single"), ("train", "two"))
        for i, scene in enumerate(evaluation_scenes(COUNT, split, kind))
    }
    return context(Produce(), images=images)


@pytest.fixture(scope="module")
def report(produce):
    return ProduceAccuracy(samples=COUNT).evaluate(produce)


SETS = (
    "single objects, held-out combinations",
    "single objects, trained combinations",
    "two objects",
)


def test_true_renderings_score_nearly_all_and_by_chance_nothing(report):
    for name in SETS:
        assert report.scalars[f"{name}/joint"] >= 0.8
        assert report.scalars[f"{name}/joint/ceiling"] >= 0.8
        assert report.scalars[f"{name}/joint/chance"] <= 0.2


def test_every_figure_states_its_images_and_prompts(report):
    assert report.provenance.keys() == report.scalars.keys()
    about = [report.provenance[f"{name}/joint"] for name in SETS]
    assert [one["images"] for one in about] == [COUNT] * 3
    assert len({one["prompts"] for one in about}) == 3


def test_every_attribute_has_a_line_of_three_figures(report):
    lines = report.text.splitlines()
    attributes = [line for line in lines if line.startswith("  ")]
    assert len(lines) == len(SETS) + len(attributes)
    assert 3 * len(attributes) == len(report.scalars)
    assert all(line.count("%") == 3 for line in attributes)
    assert all(tuple(line.split()[-3:]) == COLUMNS for line in lines if line not in attributes)
    assert lines[-1].split()[0] == "joint"


def test_models_on_latents_have_a_column_for_their_autoencoder(produce, report):
    class Latent(Perfect):
        pipeline = SimpleNamespace(autoencode=lambda images: np.full_like(images, 128))

    denoiser = dataclasses.replace(produce.spec.denoiser, channels=4)
    spec = dataclasses.replace(
        produce.spec, denoiser=denoiser, autoencoder=AutoencoderConfig(latent_channels=4)
    )
    latent = Latent(0, spec, {}, {}, produce.data, images=produce.images)
    found = ProduceAccuracy(samples=COUNT).evaluate(latent)
    for name in SETS:
        assert found.scalars[f"{name}/joint/latents"] == 0
        for end in ("joint", "joint/ceiling", "joint/chance"):
            assert found.scalars[f"{name}/{end}"] == report.scalars[f"{name}/{end}"]
    assert found.text.splitlines()[0].endswith("latents")


def test_true_emoji_score_all_in_all_three_columns(context, tmp_path, monkeypatch):
    def noise(path, size: int) -> None:  # in the place of the drawings, which take long to render
        shape = (len(openmoji._svg_files()), size, size, 3)
        np.save(path, np.random.default_rng(0).integers(0, 256, shape, np.uint8))

    monkeypatch.setattr(openmoji, "_render_all", noise)
    source = OpenMoji(size=32, cache=str(tmp_path))
    emojis = dataclasses.replace(source, split="all")
    places = {emoji.name: i for i, emoji in enumerate(emojis.emojis)}
    images = {p.text: emojis.image(places[p.target]) for p in held_out_prompts(COUNT)}
    report = OpenMojiAccuracy(samples=COUNT).evaluate(context(source, 32, images))
    name = "people at work, held-out combinations"
    for attribute in ("gender", "tone", "joint"):
        assert report.scalars[f"{name}/{attribute}"] == 1
    assert report.scalars[f"{name}/joint/ceiling"] == 1
    assert report.scalars[f"{name}/joint/chance"] <= 0.3
    assert len(report.scalars) == 9


@pytest.mark.parametrize(
    ("evaluator", "source", "size", "message"),
    [
        (ProduceAccuracy(), Produce(size=32), 32, "cannot score images of 32 pixels: expected 64"),
        (OpenMojiAccuracy(), OpenMoji(size=48), 64, "expected data.source to be OpenMoji"),
        (OpenMojiAccuracy(), Produce(), 64, "expected data.source to be OpenMoji"),
        (ClipScore(), CachedLatents(path="latents"), 64, r"needs images .* data\.source\.of"),
        (SampleGrid(prompts=()), Produce(), 64, "has no prompts"),
        (Reconstructions(), Produce(), 64, r"needs an autoencoder but .* a TextToImage"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unfit_models_and_data_are_refused(evaluator, source, size, message, context):
    place = context(source, size)
    with pytest.raises(UserError, match=rf"'{evaluator.name}'.*{message}.*(leave|give)"):
        evaluator.check(place.spec, place.data)


@pytest.mark.parametrize(
    "evaluator", [ProduceAccuracy(), OpenMojiAccuracy(), ClipScore(), SampleGrid(prompts=("a",))]
)
def test_models_without_text_are_refused(evaluator, context):
    data = context(Produce()).data
    with pytest.raises(UserError, match=r"needs a text-to-image model but .* a AutoencoderConfig"):
        evaluator.check(AutoencoderConfig(), data)


def test_fit_models_and_data_are_not_refused(context):
    for evaluator, source, size in (
        (ProduceAccuracy(), Produce(), 64),
        (ProduceAccuracy(), CachedLatents(path="latents"), 64),
        (OpenMojiAccuracy(), OpenMoji(size=32), 32),
        (OpenMojiAccuracy(), CachedLatents(path="latents", of=OpenMoji(size=32)), 32),
        (ClipScore(), ImageFolder(path="photos"), 48),
        (SampleGrid(prompts=("a pea",)), ImageFolder(path="photos"), 48),
    ):
        place = context(source, size)
        evaluator.check(place.spec, place.data)
    Reconstructions().check(AutoencoderConfig(), context(Produce()).data)


@pytest.mark.parametrize("kind", [ProduceAccuracy, OpenMojiAccuracy, ClipScore])
def test_fewer_than_two_samples_are_refused(kind):
    with pytest.raises(
        UserError, match=rf"{kind.__name__}\.samples is 1: expected a whole number, at least 2"
    ):
        kind(samples=1)


def test_a_label_is_a_name_that_files_may_have():
    assert ClipScore(label="clip_b-32").prefix == "clip_b-32"
    assert ClipScore().prefix == "clip_score"
    for label in ("", "a/b", "a b"):
        with pytest.raises(UserError, match=r"ClipScore\.label is .*: expected a name of letters"):
            ClipScore(label=label)


@pytest.fixture
def matching(monkeypatch):
    """In the place of CLIP, vectors that are equal if image and caption are of one record."""
    calls = []

    def embed(model, images):
        numbers = images[:, 0, 0, 0].tolist()
        calls.append((model, numbers))
        return jnp.eye(64)[np.array(numbers)]

    def network(model):
        return FeatureNetwork(
            label="clip",
            published={},
            usual=(),
            width=64,
            provenance={"weights": f"of {model}"},
            prepare=lambda image: image,
            embed=functools.partial(embed, model),
            batch_size=4,
        )

    def texts(model, prompts):
        calls.append((model, list(prompts)))
        return np.eye(64, dtype=np.float32)[[int(prompt.split()[-1]) for prompt in prompts]]

    monkeypatch.setattr(clip_score, "clip_score_network", network)
    monkeypatch.setattr(clip_score, "clip_text_vectors", texts)
    return calls


class Numbered:
    """Records whose images and captions have their number; None is a record without a caption."""

    def __init__(self, numbers):
        self.numbers = numbers

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index, /):
        number = self.numbers[index]
        if number == "bad":
            raise RecordError(f"{index}: unreadable")
        captions = [] if number is None else [f"a pea {number}"]
        return {
            "image": np.full((8, 8, 3), number or 0, np.uint8),
            "captions": captions,
            "name": str(index),
        }

    def check(self):
        pass


def test_the_clip_score_compares_images_with_their_and_other_captions(context, matching):
    numbers = [11, 22, "bad", 33, 44, None]
    images = {f"a pea {n}": np.full((8, 8, 3), n, np.uint8) for n in (11, 22, 33, 44)}
    images["a pea 44"] = np.zeros((8, 8, 3), np.uint8)  # generated wrongly
    place = context(Numbered(numbers), 8, images)
    report = ClipScore(samples=6, clip_model="mine").evaluate(place)
    cosines = {"score": 75.0, "data": 100.0, "chance": 0.0}
    ranks = {"retrieval": 0.75, "text_retrieval": 0.75}
    of_data = {"retrieval_data": 1.0, "text_retrieval_data": 1.0}
    assert report.scalars == cosines | ranks | of_data
    assert report.scalars.keys() == ClipScore().figure_names()
    assert report.text.startswith(
        "CLIP score (mine), 4 images (too few usable records for 6 samples): "
        "score 75.0, data 100.0, chance 0.0; retriev"
    )
    about = report.provenance["retrieval"]
    assert (about["weights"], about["images"]) == ("of mine", 4)
    captions = [f"a pea {n}" for n in (11, 22, 33, 44)]
    images = [[11, 22, 33, 0], [11, 22, 33, 44]]  # each once
    assert matching == [("mine", found) for found in (captions, *images)]


def test_blocks_do_not_change_retrieval(monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(2, 50, 3)).astype(np.float32)
    names = [str(i // 2) for i in range(50)]
    cosines = vectors[0] @ vectors[1].T
    same = np.array(names)
    expected = tuple((same[cosines.argmax(axis)] == same).mean() for axis in (1, 0))
    assert clip_score.retrieval(*vectors, names) == expected
    monkeypatch.setattr(clip_score, "_BLOCK", 7)
    assert clip_score.retrieval(*vectors, names) == expected


def test_a_clip_that_does_not_exist_is_refused_before_any_image_is_generated(context, tmp_path):
    place = context(Produce())
    with pytest.raises(UserError, match="none"):
        ClipScore(clip_model=str(tmp_path / "none")).check(place.spec, place.data)


def test_data_without_captions_have_no_clip_score(context, matching):
    with pytest.raises(UserError, match="'clip_score' found 1 usable records with a caption"):
        ClipScore(samples=3).evaluate(context(Numbered(["bad", 11, None]), 8))


def test_prompts_become_a_grid_and_their_estimates_a_strip(context):
    prompts = ("a small red pea", "a green tomato with a stem", "a blue pear")

    def snapshots(texts, num):
        assert tuple(texts) == prompts
        return np.zeros((num, len(texts), 64, 64, 3), np.uint8)

    class Estimates(EvalContext):
        pipeline = SimpleNamespace(snapshots=snapshots)

    place = Estimates(0, context(Produce()).spec, {}, {}, context(Produce()).data)
    report = SampleGrid(prompts=prompts, snapshots=5).evaluate(place)
    assert report.images.keys() == {"samples", "strip"}
    assert report.images["samples"].shape[1] > 2 * 128  # two columns, at twice the size
    height, width, _ = report.images["strip"].shape
    assert width > 5 * 64
    assert 3 * 64 < height < 4 * 64


def test_reconstructions_are_of_the_first_usable_records(context, monkeypatch):
    whole = Produce.__getitem__

    def spoiled(self, index):
        if index == 0:
            raise RecordError("produce/train/0: unreadable")
        record = whole(self, index)
        return record | {"captions": []} if index == 2 else record

    class Negative:
        """In the place of an autoencoder, returns the negative of an image."""

        def encode(self, images):
            return Gaussian(images, images)

        def decode(self, z):
            return -z

    monkeypatch.setattr(Produce, "__getitem__", spoiled)
    monkeypatch.setattr(samples, "bind_params", lambda *_: Negative())
    source, spec = Produce(size=32), AutoencoderConfig()
    samples._reconstruct.cache_clear()
    report = Reconstructions().evaluate(context(source, 32, spec=spec))
    samples._reconstruct.cache_clear()
    tiles = report.images["samples"][2:, 2:].reshape(4, 66, 8, 66, 3)[:, :64:2, :, :64:2]
    for place, index in ((0, 1), (1, 3), (7, 9)):
        image = whole(source, index)["image"]
        np.testing.assert_array_equal(tiles[0, :, place], image)
        np.testing.assert_array_equal(tiles[2, :, place], 255 - image)


def test_images_are_generated_with_the_arguments_of_the_generation(context, monkeypatch):
    calls = []

    class Recording(EvalContext):
        @staticmethod
        def pipeline(prompts, **arguments):
            calls.append((list(prompts), arguments))
            return np.zeros((len(prompts), 8, 8, 3), np.uint8)

    def best(pipe, prompts, n, *, clip, **arguments):
        calls.append((list(prompts), {"n": n, "clip": clip, **arguments}))
        zeros = np.zeros(len(prompts), np.uint32)
        return Ranked(pipe(prompts), zeros, np.zeros((len(prompts), n), np.float32))

    monkeypatch.setattr(interface, "best_of_n", best)
    base = context(Produce())
    plain = Recording(0, base.spec, {}, {}, base.data)
    plain.generate(["a", "b"])
    guidance = Generation(arguments={"guidance_scale": 1.5})
    dataclasses.replace(plain, generation=guidance).generate(["a"])
    best_of_3 = Generation(best_of=3, clip_model="mine", arguments={"batch_size": 2})
    chosen = dataclasses.replace(plain, generation=best_of_3)
    assert chosen.generate(["c"]).shape == (1, 8, 8, 3)
    assert calls == [
        (["a", "b"], {}),
        (["a"], {"guidance_scale": 1.5}),
        (["c"], {"n": 3, "clip": "mine", "batch_size": 2}),
        (["c"], {}),
    ]
    with pytest.raises(UserError, match="best_of is 0"):
        Generation(best_of=0)


def test_hosts_generate_a_share_each_and_return_all(context, monkeypatch):
    calls = []

    class Numbered(EvalContext):
        @staticmethod
        def pipeline(prompts, seeds=range(5)):
            calls.append((list(prompts), list(seeds)[: len(prompts)]))
            return np.stack([np.full((64, 64, 3), int(prompt), np.uint8) for prompt in prompts])

    base = context(Produce())
    place, prompts = Numbered(0, base.spec, {}, {}, base.data), ["0", "1", "2", "3"]
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    shares = []
    for host in range(3):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        shares.append(place.generate_share(prompts))
    assert calls == [(["0", "1"], [0, 1]), (["2", "3"], [2, 3])]  # two each, none for the last

    def gather(rows):
        assert rows.shape == (2, 64, 64, 3)
        return np.stack([shares[0], shares[1], np.zeros_like(rows)])

    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    assert place.generate(prompts)[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_a_context_builds_the_pipeline_of_its_model(tiny_bundle, tiny_recipe):
    config = tiny_recipe()
    context = EvalContext(
        3, tiny_bundle.spec, tiny_bundle.params, tiny_bundle.tokenizers, config.data
    )
    images = context.generate(["a small red pea", "a green tomato"])
    assert images.shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(images, context.pipeline(["a small red pea", "a green tomato"]))
    assert context.pipeline is context.pipeline


def test_evaluators_sample_on_the_mesh_that_trains(tiny_bundle, tiny_recipe):
    spec, config = tiny_bundle.spec, tiny_recipe()
    mesh = make_mesh(MeshConfig(fsdp=2, context=2), jax.devices()[:4])
    params = shard(tiny_bundle.params, mesh, spec.param_axes())
    arguments = {"num_steps": 2, "output": "float"}
    alone = EvalContext(3, spec, tiny_bundle.params, tiny_bundle.tokenizers, config.data)
    expected = alone.pipeline(["a small red pea"], **arguments)
    text = jax.device_get(params["text_encoders"])
    for there in (params, {**params, "text_encoders": text}):
        context = dataclasses.replace(alone, params=there, mesh=mesh)
        pipe = context.pipeline
        assert (pipe.mesh.fsdp, pipe.mesh.context) == (4, 1)
        assert pipe.offload_text == (there is not params)
        images = pipe(["a small red pea"], **arguments)
        np.testing.assert_allclose(images, expected, atol=1e-4)
