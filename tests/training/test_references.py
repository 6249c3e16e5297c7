"""Training on pairs: images, and the reference images that their captions describe how to edit."""

import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from flax import nnx
from PIL import Image

from jaxdiff.data.loader import ON_DEVICE, make_dataset
from jaxdiff.data.sources.array_record import ArrayRecord
from jaxdiff.data.sources.cached_latents import LatentOptions
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import Report
from jaxdiff.evaluation.samples import SampleGrid
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.training.abstract import abstract_batch, flops_per_image
from jaxdiff.training.held_out import held_out_metrics
from jaxdiff.training.initial_weights import load_parts
from jaxdiff.training.loop import train
from jaxdiff.training.prepare_shards import Sharing, with_cache, write_records
from jaxdiff.training.tasks.diffusion import Pretrained
from tests.pretrained.families import SPECS
from tests.training.families import recipe, short, write_models

pytestmark = pytest.mark.slow

NAME, BATCH = "klein base", 8
SQUARE, WIDE = (32, 32), (24, 40)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny klein, and three sorts of pairs with one caption: no, one or two references."""
    root = tmp_path_factory.mktemp("references")
    write_models(root, [NAME])
    layout = [(SQUARE, SQUARE), (SQUARE, WIDE), (WIDE, WIDE, SQUARE), (SQUARE,)] * BATCH
    write_pairs(root / "mixed", layout)
    with (root / "mixed" / "metadata.jsonl").open("a") as lines:
        lines.write(json.dumps({"file_name": "0_0.png", "text": "a", "reference": "gone.png"}))
    write_pairs(root / "pairs", [(SQUARE, SQUARE)] * BATCH, distinct=2)
    return root


def write_pairs(folder, layout, distinct=None):
    """Write records of random images, each with its references, of these heights and widths."""
    folder.mkdir()
    lines = []
    for i, shapes in enumerate(layout):
        rng = np.random.default_rng(i % (distinct or len(layout)))
        names = [f"{i}_{k}.png" for k in range(len(shapes))]
        for name, (height, width) in zip(names, shapes, strict=True):
            pixels = 255 * rng.integers(0, 2, (2, 2, 3), np.uint8)
            Image.fromarray(pixels).resize((width, height), 0).save(folder / name)
        lines.append({"file_name": names[0], "text": "an edit", "reference": names[1:]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def config_of(root, name, *, model=NAME, **options):
    return pairs_of(short(SPECS[model]), root / model, root / name, **options)


def pairs_of(spec, model, folder, *, references=2, steps=4):
    """Train the whole denoiser of a model's folder on a folder of pairs."""
    config = recipe(spec, model, folder, whole=True, steps=steps)
    source = ImageFolder(path=str(folder), reference="reference")
    transforms = dataclasses.replace(config.data.transforms, references=references)
    data = dataclasses.replace(config.data, source=source, transforms=transforms)
    return dataclasses.replace(config, data=data)


def uncached(config):
    return dataclasses.replace(config.data, cache=LatentOptions())


def batches_of(root, config, data, count):
    tokenize = config.task.tokenize(load_bundle(root / NAME).tokenizers)
    batches = make_dataset(data, tokenize, batch_size=BATCH, seed=0)
    return [batch for batch, _ in zip(batches, range(count), strict=False)]


@pytest.fixture(scope="module")
def loss_of(root):
    task = config_of(root, "pairs").task
    frozen, initial = (
        jax.tree.map(jnp.asarray, load_parts(parts))
        for parts in (task.frozen_parts(), task.initial_parts())
    )

    @jax.jit
    def loss(params, frozen, batch):
        keys = RowKeys.whole(jax.random.key(0), BATCH)
        return task.loss(params, frozen, batch, keys, task.init_state(), params)[0]

    def on_device(batch):
        return float(loss(initial, frozen, {k: v for k, v in batch.items() if k in ON_DEVICE}))

    return on_device


def test_cached_and_prepared_records_train_as_the_files_do(root, loss_of, tmp_path):
    config = config_of(root, "mixed")
    online = batches_of(root, config, uncached(config), 5)
    shapes = {tuple(x.shape[1:3] for x in b.get("references", ())) for b in online}
    assert shapes == {(SQUARE,), (WIDE,), (WIDE, SQUARE), ()}
    cached, account = with_cache(config, epath.Path(tmp_path / "latents"))
    assert account.reasons == {"without a reference image": 1}
    assert (account.found, account.used) == (4 * BATCH + 1, 4 * BATCH)
    latents = batches_of(root, config, cached.data, 5)
    for one, other in zip(online, latents, strict=True):
        assert len(one.get("references", ())) == len(other.get("references", ()))
        np.testing.assert_allclose(loss_of(one), loss_of(other), rtol=2e-5)
    write_records(None, config.data, str(tmp_path / "shards"), Sharing())
    shards = dataclasses.replace(
        uncached(config), source=ArrayRecord(path=str(tmp_path / "shards"))
    )
    for one, other in zip(online, batches_of(root, config, shards, 5), strict=True):
        jax.tree.map(
            np.testing.assert_array_equal,
            *({k: v for k, v in batch.items() if k in ON_DEVICE} for batch in (one, other)),
        )


def test_a_model_learns_to_follow_the_reference(root):
    """Captions are all the same: only the reference says which of two images is wanted."""
    config = config_of(root, "pairs", references=1)
    spec, model = config.task.model, str(root / NAME)
    denoiser = dataclasses.replace(spec.denoiser, channels=3, patch_size=4)
    task = dataclasses.replace(
        config.task,
        model=dataclasses.replace(spec, denoiser=denoiser, autoencoder=None),
        pretrained=Pretrained(text_encoders=model),
    )
    frozen = jax.tree.map(jnp.asarray, load_parts(task.frozen_parts()))
    optimizer = optax.adam(2e-2, b2=0.99)
    batch, *_ = batches_of(root, config, uncached(config), 1)
    batch = {key: value for key, value in batch.items() if key in ON_DEVICE}
    encode = jax.jit(lambda frozen, text: task.model.encode_text(frozen, text))
    batch["text_features"] = task.conditioner.pack(encode(frozen, batch["text"]))

    @jax.jit
    def loss(params, batch, key):
        keys = RowKeys.whole(key, BATCH)
        return task.loss(params, frozen, batch, keys, task.init_state(), params)[0]

    @jax.jit
    def step(params, state, key):
        updates, state = optimizer.update(jax.grad(loss)(params, batch, key), state)
        return optax.apply_updates(params, updates), state

    params = task.init_params(nnx.Rngs(0))
    state = optimizer.init(params)
    for i in range(160):
        params, state = step(params, state, jax.random.key(i))
    (references,) = batch["references"]
    distinct = np.unique(references, axis=0)
    assert len(distinct) == 2
    first = (references == distinct[0]).all((1, 2, 3))
    swapped = np.where(first[:, None, None, None], distinct[1], distinct[0])
    key = jax.random.key(1000)
    right = loss(params, batch, key)
    assert float(right) < 0.6 * float(loss(params, {**batch, "references": (swapped,)}, key))


@pytest.mark.nightly
def test_stopped_and_resumed_equals_straight_bit_for_bit(root, tmp_path):
    config = config_of(root, "mixed", steps=6)
    straight = train(config, tmp_path / "straight", log=lambda _: None)

    def evaluate(state, *_):
        if int(state.step) == 3:
            signal.raise_signal(signal.SIGINT)
        return Report()

    evaluated = dataclasses.replace(config, evaluators=(SampleGrid(prompts=("a",), every=1),))
    stopped = train(evaluated, tmp_path / "run", evaluate=evaluate, log=lambda _: None)
    assert (stopped.finished, stopped.summary["step"]) == (False, 3)
    resumed = train(evaluated, tmp_path / "run", log=lambda _: None)
    assert resumed.summary["fingerprint"] == straight.summary["fingerprint"]


def test_data_and_models_that_do_not_fit_are_refused(root):
    with pytest.raises(UserError, match=r"references is 5 but the model reads 4 reference images"):
        config_of(root, "pairs", references=5)
    with pytest.raises(UserError, match=r"references is 1 but the model reads no reference images"):
        config_of(root, "pairs", references=1, model="Z-Image")
    config = config_of(root, "pairs", references=0)
    with pytest.raises(UserError, match=r"has 1 reference image, more than the 0 of data\.trans"):
        batches_of(root, config, uncached(config), 1)
    config = config_of(root, "pairs", references=1)
    source = dataclasses.replace(config.data.source, reference=None)
    with pytest.raises(UserError, match=r"no record has a reference image: .*data\.source\.ref"):
        batches_of(root, config, dataclasses.replace(uncached(config), source=source), 1)


def test_plans_count_references(root):
    config = config_of(root, "pairs", references=1)
    online = dataclasses.replace(config, data=uncached(config))
    batch, *_ = batches_of(root, config, online.data, 1)
    kinds = lambda batch: {  # noqa: E731
        key: jax.tree.map(lambda x: (x.shape, x.dtype), value)
        for key, value in batch.items()
        if key in ON_DEVICE
    }
    assert kinds(abstract_batch(online)) == kinds(batch)
    alone = config_of(root, "pairs", references=0)
    model = config.task.model
    size = dict(zip(("height", "width"), model.latent_shape(*SQUARE), strict=False))
    more, less = (
        model.denoiser.flops(**size, text_length=32, reference_tokens=tokens) for tokens in (64, 0)
    )
    found = flops_per_image(config) - flops_per_image(alone)
    assert found == pytest.approx(3 * (more - less))


def test_held_out_records_have_one_number_of_references(root):
    """Those with one reference, the most frequent: a batch has one number of them."""
    config = config_of(root, "mixed")
    config = dataclasses.replace(config, data=dataclasses.replace(uncached(config), held_out=0.9))
    parts = config.task.frozen_parts(), config.task.initial_parts()
    frozen, params = (jax.tree.map(jnp.asarray, load_parts(one)) for one in parts)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    tokenizers = load_bundle(root / NAME).tokenizers
    metrics, _ = held_out_metrics(config, params, frozen, tokenizers, mesh, 4 * BATCH)
    assert np.isfinite(metrics["loss"])
