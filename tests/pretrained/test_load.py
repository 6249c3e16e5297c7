import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from flax import nnx
from safetensors import deserialize
from safetensors.numpy import save

from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.components import Latents
from jaxdiff.models.layers import abstract_params, any_rngs
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.load import (
    SHIPPED,
    check_fit,
    make_folder,
    read_bundle,
    read_config,
    read_pretrained,
    read_weights,
    weights_fingerprint,
    write_bundle,
    write_config,
    write_weights,
)
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.state import TrainState, no_skips
from jaxdiff.training.tasks.autoencoder import AutoencoderTask
from jaxdiff.training.tasks.base import Pretrained

SMALL = AutoencoderConfig(
    latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4
)


@pytest.fixture
def folder(tiny_bundle, tmp_path):
    write_bundle(tmp_path / "model", tiny_bundle, dtype="float32")
    return tmp_path / "model"


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


def test_float32_survives_bit_for_bit(tiny_bundle, folder):
    bundle = read_bundle(folder)
    assert bundle.config == tiny_bundle.config
    assert_same(bundle.params, tiny_bundle.params)
    assert bundle.frozen == {}
    texts = ["a small red pea", "something else"]
    np.testing.assert_array_equal(bundle.tokenizer(texts), tiny_bundle.tokenizer(texts))
    assert weights_fingerprint(bundle.params) == weights_fingerprint(tiny_bundle.params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shorter_types_round_once_and_are_read_as_float32(tiny_bundle, tmp_path, dtype):
    write_bundle(tmp_path, tiny_bundle, dtype=dtype)
    short = np.dtype(getattr(ml_dtypes, dtype, dtype))
    stored = deserialize((tmp_path / "model.safetensors").read_bytes())
    assert {tensor["dtype"] for _, tensor in stored} == {{"bfloat16": "BF16"}.get(dtype, "F16")}
    rounded = jax.tree.map(lambda x: x.astype(short).astype(np.float32), tiny_bundle.params)
    assert_same(read_bundle(tmp_path).params, rounded)


def test_lists_of_modules_survive(tiny_bundle, tmp_path):
    """An autoencoder's levels go by their number, which a file can only hold as text."""
    task = AutoencoderTask(model=SMALL)
    config = dataclasses.replace(tiny_bundle.config, task=task)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        abstract_params(lambda: task.build(any_rngs())),
    )
    write_bundle(tmp_path, Bundle(config, params, {}, None), dtype="float32")
    bundle = read_bundle(tmp_path)
    assert_same(bundle.params, params)
    assert bundle.tokenizer is None

    run = tmp_path / "run"
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(0, impl="threefry2x32"),
        params=params,
        ema=jax.device_put(params),
        opt_state=(),
        task_state=(),
        nonfinite=no_skips(),
    )
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(state)
    write_config(run, config)
    assert_same(read_bundle(run).params, params)

    user = dataclasses.replace(
        tiny_bundle.config.task,
        denoiser=dataclasses.replace(tiny_bundle.config.task.denoiser, channels=4),
        latents=Latents(model=SMALL, pretrained=str(tmp_path)),
    )
    assert_same(read_pretrained(user.frozen()), {"autoencoder": params})

    wider = dataclasses.replace(SMALL, block_out_channels=(8, 32))
    other = Latents(model=wider, pretrained=str(tmp_path))
    with pytest.raises(UserError, match="is of shape"):
        read_pretrained(dataclasses.replace(user, latents=other).frozen())


def test_a_part_is_taken_whether_it_was_trained_or_frozen(tiny_bundle, folder):
    text = dataclasses.replace(tiny_bundle.config.task.text, pretrained=str(folder), trained=False)
    task = dataclasses.replace(tiny_bundle.config.task, text=text)
    assert_same(read_pretrained(task.frozen()), {"text": tiny_bundle.params["text"]})

    (params := dict(tiny_bundle.params)).pop("text")
    frozen = {"text": tiny_bundle.params["text"]}
    config = dataclasses.replace(tiny_bundle.config, task=task)
    write_bundle(folder, Bundle(config, params, frozen, None), dtype="float32")
    assert_same(read_pretrained(task.frozen()), frozen)


def test_a_part_that_the_model_does_not_have_is_told(tiny_bundle, folder):
    build = tiny_bundle.config.task.build
    wanted = {"perceptual": Pretrained(str(folder), ("vision",), lambda: build(nnx.Rngs(0)))}
    with pytest.raises(UserError, match="no part 'vision' to serve as perceptual"):
        read_pretrained(wanted)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_cut_off_weights_are_told(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut off"):
        read_bundle(folder)


def test_a_damaged_header_is_told(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[10:20] = b"\xff" * 10
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="damaged"):
        read_bundle(folder)


def test_weights_that_are_no_floats_are_told(folder):
    (folder / "model.safetensors").write_bytes(save({"params.a": np.zeros(3, np.int32)}))
    with pytest.raises(UserError, match=r"I32 in params\.a: expected F32"):
        read_bundle(folder)


def test_a_folder_without_a_model_is_told(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"holds no model: expected config\.json"):
            read_bundle(place)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="holds no model"):
        read_bundle(tmp_path / "file")


def test_a_folder_without_weights_is_told(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no checkpoint"):
        read_bundle(folder)
    with pytest.raises(UserError, match="is missing"):
        read_weights(epath.Path(folder / "model.safetensors"))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"type": "Config"}'])
def test_an_unreadable_recipe_is_told(folder, data):
    (folder / "config.json").write_bytes(data)
    with pytest.raises(UserError, match="config"):
        read_config(folder)


def test_a_recipe_that_does_not_fit_the_weights_is_told(folder):
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["task"]["denoiser"]["patch_size"] = 16
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"params\.denoiser\.\S+ is of shape \(.*config\.json"):
        read_bundle(folder)


def test_missing_and_unexpected_weights_are_named(tiny_bundle):
    with pytest.raises(UserError, match=r"a\.b is missing; c is not expected"):
        check_fit({"c": np.zeros(1)}, {"a": {"b": np.zeros(1)}}, "model")


def test_nothing_is_written_half(tiny_bundle, tmp_path, monkeypatch):
    """A writer that dies leaves no recipe without its weights."""
    renamed = type(epath.Path(tmp_path)).replace

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "model", tiny_bundle)
    assert not (tmp_path / "model" / "config.json").exists()
    with pytest.raises(UserError, match="holds no model"):
        read_bundle(tmp_path / "model")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", renamed)
    write_bundle(tmp_path / "model", tiny_bundle)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_folder_is_made_or_told(tmp_path):
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(tmp_path / "a").is_dir()
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be made a folder"):
            make_folder(place)


def test_the_fingerprint_sees_names_and_values():
    tree = {"a": np.ones(2, np.float32), "b": {"c": np.zeros(2, np.float32)}}
    same = {"b": {"c": np.zeros(2, np.float32)}, "a": np.ones(2, np.float32)}
    assert weights_fingerprint(tree) == weights_fingerprint(same)
    for other in (
        {"a": np.ones(2, np.float32), "b": {"d": np.zeros(2, np.float32)}},
        {"a": np.nextafter(np.ones(2, np.float32), 2), "b": {"c": np.zeros(2, np.float32)}},
    ):
        assert weights_fingerprint(other) != weights_fingerprint(tree)


def test_a_model_that_ships_is_found_by_name():
    assert read_config("shipped:produce").name == read_config(SHIPPED / "produce").name
    with pytest.raises(UserError, match=r"no model shipped:prodce: .* shipped:produce"):
        read_bundle("shipped:prodce")


def test_an_exported_model_does_not_hide_a_run(tiny_bundle, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="is the folder of a run"):
        write_bundle(tmp_path, tiny_bundle)


def test_scalars_keep_their_shape(tmp_path):
    path = epath.Path(tmp_path / "model.safetensors")
    write_weights(path, params={"logit_scale": np.float32(2.5)})
    assert read_weights(path)["params"]["logit_scale"].shape == ()


def test_what_ships_is_small_and_fits_its_recipe():
    files = [path for path in Path(SHIPPED).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    for config in Path(SHIPPED).glob("*/config.json"):
        read_bundle(f"shipped:{config.parent.name}")
