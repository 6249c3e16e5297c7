"""FLUX.1, FLUX.2 and Z-Image train whole and by adapters, on cached latents and text."""

import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxdiff.data.loader import ON_DEVICE, make_dataset
from jaxdiff.diffusion.objectives import LossOutputs, Objective
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.errors import UserError
from jaxdiff.evaluation.samples import SampleGrid
from jaxdiff.models.lora import factors
from jaxdiff.pretrained.diffusers_folder import write_diffusers
from jaxdiff.pretrained.load import load_bundle, read_spec
from jaxdiff.pretrained.run_folder import FROZEN
from jaxdiff.training.initial_weights import abstract_frozen_params, load_parts
from jaxdiff.training.loop import train
from jaxdiff.training.prepare_shards import with_cache
from jaxdiff.training.workdir import CACHE
from tests.pretrained.test_families import SPECS
from tests.training.families import BATCH, recipe, short, write_models, write_photos

STEPS = 6
FAMILIES = ("FLUX.1 dev", "klein base", "Z-Image")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models with random weights, whose text encoders read 32 tokens at most."""
    root = tmp_path_factory.mktemp("families")
    write_models(root, FAMILIES)
    write_photos(root / "photos")
    return root


def config_of(models, name, **options):
    return recipe(short(SPECS[name]), models / name, models / "photos", **options)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["adapters", "whole"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "klein base" else pytest.mark.nightly)
        for name in FAMILIES
    ],
)
def test_the_loss_of_a_batch_falls(name, whole, models, tmp_path):
    config = config_of(models, name, whole=whole, steps=STEPS)
    result = train(config, tmp_path, log=lambda _: None)
    assert np.isfinite([[r["loss"], r["grad_norm"]] for r in records(tmp_path)]).all()
    task, params = config.task, result.state.params
    if not whole:
        pairs = factors(params["adapters"]["denoiser"])
        ends = {path[-1]: pair.down.shape[-1] for path, pair in pairs.items()}
        assert ends.keys() == set(task.trainable.lora.targets)
        assert {ends["q"], ends["out"]} == {2}
        assert 3 in ends.values()
        assert min(float(jnp.abs(pair.up).max()) for pair in pairs.values()) > 0
        before = jax.tree.map(jnp.zeros_like, params)
    else:
        before = load_parts(task.initial_parts())
    cached, _ = with_cache(config, epath.Path(tmp_path) / CACHE)
    tokenize = task.tokenize(result.tokenizers)
    data = make_dataset(cached.data, tokenize, batch_size=BATCH, seed=0)
    batches = [batch for batch, _ in zip(data, range(4), strict=False)]
    assert len({batch["latents"].shape for batch in batches}) == 2
    batch = jax.tree.map(jnp.asarray, {k: v for k, v in batches[0].items() if k in ON_DEVICE})
    assert "text_features" in batch
    state = task.init_state()

    @jax.jit
    def loss(params):
        keys = RowKeys.whole(jax.random.key(0), BATCH)
        return task.loss(params, result.frozen, batch, keys, state, params)[0]

    first, last = float(loss(before)), float(loss(params))
    assert last < 0.97 * first


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadsGuidance(Objective):
    """Its loss is the guidance scale that the network reads."""

    def loss(self, inputs):
        guidance = inputs.cond.guidance
        return LossOutputs(guidance, jnp.zeros(len(guidance)), {}, ())


def test_a_network_with_a_guidance_embedding_reads_the_guidance_of_the_task(models):
    config = config_of(models, "FLUX.1 dev", whole=True, steps=1)
    task = dataclasses.replace(config.task, objective=ReadsGuidance())
    conditioner = task.model.conditioner
    batch = {
        "latents": jnp.zeros((2, 4, 4, 8)),
        "text": conditioner.tokenize(load_bundle(models / "FLUX.1 dev").tokenizers, ["", "a"]),
        "text_features": jnp.zeros((2, conditioner.packed_size)),
        "size_crop": jnp.zeros((2, 6), jnp.int32),
    }
    frozen = jax.tree.map(lambda x: jnp.zeros(x.shape), abstract_frozen_params(task))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), task.model.abstract_params()["denoiser"])
    keys = RowKeys.whole(jax.random.key(0), 2)
    for expected in (1.0, 3.5):
        if expected != 1:  # the default
            task = dataclasses.replace(task, guidance=expected)
        state = task.init_state()
        found, *_ = task.loss({"denoiser": params}, frozen, batch, keys, state, None)
        assert float(found) == expected


def test_guidance_is_for_networks_that_read_it(models):
    task = config_of(models, "klein base", whole=True, steps=1).task
    with pytest.raises(UserError, match=r"task\.guidance is 3\.5 but the denoiser reads no"):
        dataclasses.replace(task, guidance=3.5)
    task = config_of(models, "FLUX.1 dev", whole=True, steps=1).task
    with pytest.raises(UserError, match="at least 0"):
        dataclasses.replace(task, guidance=-1.0)


@pytest.mark.slow
def test_frozen_weights_keep_the_type_of_their_source(models, tmp_path):
    """A run from bfloat16 equals that from the same numbers in float32, in half of the file."""
    bundle = load_bundle(models / "FLUX.1 dev", place=np.asarray)
    folder, prints, sizes = tmp_path / "model", [], []
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), bundle.params)
    for name, dtype in (("half", jnp.bfloat16), ("single", np.float32)):
        params = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), rounded)
        write_diffusers(folder, bundle._replace(params=params))
        config = recipe(read_spec(folder), folder, models / "photos", whole=False, steps=2)
        prints.append(train(config, tmp_path / name, log=lambda _: None).summary["fingerprint"])
        sizes.append((tmp_path / name / FROZEN).stat().st_size)
    assert prints[0] == prints[1]
    assert 1.8 < sizes[1] / sizes[0] < 2


RUNS = [
    pytest.param(
        (name, whole),
        marks=pytest.mark.nightly if whole or name != "klein base" else pytest.mark.slow,
        id=f"{name} {'whole' if whole else 'adapters'}",
    )
    for name in FAMILIES
    for whole in (True, False)
]


@pytest.fixture(scope="module", params=RUNS)
def straight(request, models, tmp_path_factory):
    """The recipe of a run on eight devices along three axes, its folder and its result."""
    name, whole = request.param
    config = config_of(models, name, whole=whole, steps=STEPS)
    config = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    folder = tmp_path_factory.mktemp("straight")
    return config, folder, train(config, folder, log=lambda _: None)


def figures(folder):
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [[record[name] for name in names] for record in records(folder)]


def test_killed_and_resumed_equals_straight_bit_for_bit(straight, tmp_path, launch):
    config, folder, expected = straight
    evaluated = dataclasses.replace(config, evaluators=(SampleGrid(prompts=("a",), every=1),))
    killed = launch(tmp_path, evaluated, code="tests/training/killed.py", devices=8)
    assert killed.wait() == [-signal.SIGKILL], killed.said()
    logged = []
    result = train(config, killed.out, log=logged.append)
    assert f"Resuming at step 4 of {STEPS}." in logged
    assert result.summary["fingerprint"] == expected.summary["fingerprint"]
    assert figures(killed.out) == figures(folder)


def test_one_device_trains_the_same(straight, tmp_path, launch):
    """Until Adam, which divides a gradient by its own size, has magnified rounding errors."""
    config, folder, _ = straight
    alone = launch(tmp_path, dataclasses.replace(config, mesh=MeshConfig()))
    assert alone.wait() == [0], alone.said()
    np.testing.assert_allclose(figures(alone.out)[:2], figures(folder)[:2], rtol=5e-4)
