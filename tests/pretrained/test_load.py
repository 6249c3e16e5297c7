import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from flax import traverse_util
from safetensors import deserialize
from safetensors.numpy import save

from jaxdiff.config.serialization import to_json
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.lora import Factors, LoraConfig, factors, tree
from jaxdiff.models.text_encoders.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from jaxdiff.pretrained.bundle import (
    Bundle,
    abstract_of,
    check_fit,
    check_params,
    exported_fingerprint,
    part_of,
    read_weights,
    weights_fingerprint,
    write_bundle,
    write_json,
    write_tokenizers,
    write_weights,
)
from jaxdiff.pretrained.load import (
    SHIPPED,
    PartSource,
    load_bundle,
    read_parts,
    read_spec,
    read_tokenizers,
)
from jaxdiff.pretrained.run_folder import FROZEN, read_word, recipe_json
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.state import TrainState, no_skips

AUTOENCODER = AutoencoderConfig(
    latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4
)
QUERY = ("blocks", "attention", "q")


@pytest.fixture
def folder(small_bundle, tmp_path):
    write_bundle(tmp_path / "model", small_bundle, dtype="float32")
    return tmp_path / "model"


def write_run(folder, spec, ema, *, frozen=None, trainable=None, tokenizers=None):
    """Write a run's folder after its first checkpoint."""
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(0, impl="threefry2x32"),
        params=jax.tree.map(jnp.zeros_like, ema),
        ema=jax.device_put(ema),
        opt_state=(),
        task_state=(),
        nonfinite=no_skips(),
    )
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(state)
    task = {"type": "DiffusionTask", "model": to_json(spec), "trainable": trainable or {}}
    write_json(epath.Path(folder) / "config.json", {"type": "Config", "task": task})
    if frozen is not None:
        write_weights(epath.Path(folder) / FROZEN, frozen)
    write_tokenizers(folder, tokenizers or {})


def tree_at(path, node):
    """A nested dict with a node at a path."""
    return traverse_util.unflatten_dict({(*path, *k): x for k, x in flat(node).items()})


def flat(node):
    return traverse_util.flatten_dict(node)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


def test_float32_survives_bit_for_bit(small_bundle, folder):
    bundle = load_bundle(folder)
    assert bundle.spec == read_spec(folder) == small_bundle.spec
    assert_same(bundle.params, small_bundle.params)
    texts = ["a small red pea", "something else"]
    for tokenizers in (bundle.tokenizers, read_tokenizers(folder)):
        expected = small_bundle.tokenizers["text"](texts)
        np.testing.assert_array_equal(tokenizers["text"](texts), expected)
    assert weights_fingerprint(bundle.params) == weights_fingerprint(small_bundle.params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shorter_types_round_once_and_are_read_as_float32(small_bundle, tmp_path, dtype):
    write_bundle(tmp_path, small_bundle, dtype=dtype)
    short = np.dtype(getattr(ml_dtypes, dtype, dtype))
    stored = deserialize((tmp_path / "model.safetensors").read_bytes())
    assert {tensor["dtype"] for _, tensor in stored} == {{"bfloat16": "BF16"}.get(dtype, "F16")}
    rounded = jax.tree.map(lambda x: x.astype(short).astype(np.float32), small_bundle.params)
    assert_same(load_bundle(tmp_path).params, rounded)


def test_keys_are_paths_and_the_recipe_is_kept_beside_them(small_bundle, tmp_path):
    write_bundle(tmp_path, small_bundle, recipe={"type": "Config"})
    keys = {key for key, _ in deserialize((tmp_path / "model.safetensors").read_bytes())}
    assert "denoiser.blocks.attention.q.kernel" in keys
    assert "text_encoders.text.token_embedding" in keys
    assert recipe_json(tmp_path) == {"type": "Config"}
    write_bundle(tmp_path, small_bundle)
    assert not (tmp_path / "recipe.json").exists()
    assert recipe_json(tmp_path) is None


def test_lists_of_modules_survive(random_params, tmp_path):
    """An autoencoder's levels have numbers, which a file can only hold as text."""
    params = random_params(AUTOENCODER)
    write_bundle(tmp_path, Bundle(AUTOENCODER, params, {}), dtype="float32")
    bundle = load_bundle(tmp_path)
    assert_same(bundle.params, params)
    assert (bundle.spec, bundle.tokenizers) == (AUTOENCODER, {})
    write_run(tmp_path / "run", AUTOENCODER, params)
    assert_same(load_bundle(tmp_path / "run").params, params)


def test_a_run_is_its_moving_average_and_its_frozen_parts(small_bundle, tmp_path):
    params = dict(small_bundle.params)
    ema = {"denoiser": params.pop("denoiser")}
    write_run(tmp_path, small_bundle.spec, ema, frozen=params, tokenizers=small_bundle.tokenizers)
    bundle = load_bundle(tmp_path)
    assert bundle.spec == read_spec(tmp_path) == small_bundle.spec
    assert_same(bundle.params, small_bundle.params)
    assert set(bundle.tokenizers) == {"text"}
    on_host = load_bundle(tmp_path, place=np.asarray).params
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(on_host))


def test_a_run_of_adapters_has_their_scale_in_them(small_bundle, tmp_path):
    rng = np.random.default_rng(0)
    pair = Factors(*(rng.normal(size=s).astype(np.float32) for s in ((2, 32, 3), (2, 3, 32))))
    ema = {
        "adapters": {
            "denoiser": tree({QUERY: pair}),
            "text_encoders": {"text": tree({QUERY: pair})},
        }
    }
    lora = to_json(LoraConfig(rank=3, alpha=6.0))
    write_run(
        tmp_path, small_bundle.spec, ema, frozen=small_bundle.params, trainable={"lora": lora}
    )
    found = load_bundle(tmp_path).params["adapters"]
    np.testing.assert_array_equal(factors(found["denoiser"])[QUERY].up, 2 * pair.up)
    np.testing.assert_array_equal(factors(found["text_encoders"]["text"])[QUERY].up, pair.up)


def test_a_run_that_learnt_a_word_states_it(small_bundle, tmp_path):
    rows = np.ones((2, 32), np.float32)
    write_run(
        tmp_path,
        small_bundle.spec,
        {"added_tokens": {"text": rows}},
        frozen=small_bundle.params,
        trainable={"inversion": {"type": "TextualInversion", "word": "<pea>"}},
    )
    word = read_word(tmp_path)
    assert word is not None
    assert word.word == "<pea>"
    np.testing.assert_array_equal(word.rows["text"], rows)
    np.testing.assert_array_equal(load_bundle(tmp_path).params["added_tokens"]["text"], rows)
    assert read_word(tmp_path / "nowhere") is None
    for task in ("x", None, {"trainable": "x"}):
        (tmp_path / "config.json").write_text(json.dumps({"type": "Config", "task": task}))
        assert read_word(tmp_path) is None


@pytest.mark.parametrize(
    "config",
    [
        {"type": "Config", "task": {"type": "DiffusionTask"}},
        {"type": "Config", "task": {"type": "ClipTask", "model": {}}, "sampling": {}},
    ],
)
def test_folders_of_the_first_version_are_refused(config, folder):
    (folder / "config.json").write_text(json.dumps(config))
    for read in (load_bundle, read_spec):
        with pytest.raises(UserError, match=r"written by jaxdiff 0\.1: .* export it again"):
            read(folder)


def test_parts_are_taken_over_in_the_expected_type(small_bundle, folder, tmp_path, random_params):
    abstract = abstract_of(small_bundle.spec)["text_encoders"]["text"]
    path = ("text_encoders", "text")
    parts = read_parts({"words": PartSource(str(folder), path, abstract)})
    assert_same(parts, {"words": small_bundle.params["text_encoders"]["text"]})
    wider = {"token_embedding": jax.ShapeDtypeStruct((1, 1), np.float32)}
    with pytest.raises(UserError, match="is of shape"):
        read_parts({"words": PartSource(str(folder), path, abstract | wider)})
    with pytest.raises(UserError, match="no part 'vision'"):
        read_parts({"vision": PartSource(str(folder), ("vision",), abstract)})

    params = random_params(AUTOENCODER)
    write_bundle(tmp_path / "vae", Bundle(AUTOENCODER, params, {}))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float16), params)
    source = PartSource(str(tmp_path / "vae"), ("autoencoder",), abstract)
    parts = read_parts({("autoencoder",): source})
    assert {x.dtype for x in jax.tree.leaves(parts)} == {np.dtype(np.float16)}


def test_a_clip_has_a_text_encoder(random_params):
    sizes = {"width": 32, "depth": 1, "heads": 2, "projection_dim": 8}
    vision = ClipVisionConfig(image_size=16, patch_size=8, **sizes)
    spec = ClipConfig(text=ClipTextConfig(vocab_size=600, length=16, **sizes), vision=vision)
    bundle = Bundle(spec, random_params(spec), {})
    for name in ("text", "text_2"):
        assert part_of(bundle, ("text_encoders", name), "clip") is bundle.params["text"]
    assert part_of(bundle, ("vision",), "clip") is bundle.params["vision"]


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_cut_off_weights_are_reported(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut off"):
        load_bundle(folder)


def test_a_damaged_header_is_reported(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[10:20] = b"\xff" * 10
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="damaged"):
        load_bundle(folder)


def test_weights_that_are_no_floats_are_reported(folder):
    (folder / "model.safetensors").write_bytes(save({"a.b": np.zeros(3, np.int32)}))
    with pytest.raises(UserError, match=r"I32 in a\.b: expected F32"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", "a.b"), "holds both a and a.b: expected a tensor, or those within it"),
        (("a.b.0", "a.b.0.c"), "holds both a.b.0 and a.b.0.c"),
        (("a.²",), "a.² is not expected"),
        (("a.01",), "a.01 is not expected"),
        (("a." + "9" * 5000,), "is not expected"),
    ],
)
def test_odd_names_of_weights_are_reported(folder, names, message):
    path = folder / "model.safetensors"
    weights = traverse_util.flatten_dict(read_weights(epath.Path(path)), sep=".")
    more = dict.fromkeys(names, np.zeros(3, np.float32))
    path.write_bytes(save({**weights, **more}))
    with pytest.raises(UserError, match=message):
        load_bundle(folder)


def test_a_folder_without_a_model_is_reported(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"holds no model: expected config\.json"):
            load_bundle(place)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="holds no model"):
        load_bundle(tmp_path / "file")


def test_a_folder_without_weights_is_reported(small_bundle, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read \(No such file"):
        load_bundle(folder)
    task = {"type": "DiffusionTask", "model": to_json(small_bundle.spec)}
    (tmp_path / "config.json").write_text(json.dumps({"type": "Config", "task": task}))
    with pytest.raises(UserError, match="no checkpoint"):
        load_bundle(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"type": "TextToImage"}'])
def test_an_unreadable_specification_is_reported(folder, data):
    (folder / "config.json").write_bytes(data)
    with pytest.raises(UserError, match="config"):
        read_spec(folder)


def test_a_specification_that_does_not_fit_the_weights_is_reported(folder):
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["denoiser"]["patch_size"] = 4
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"denoiser\.\S+ is of shape \(.*config\.json"):
        load_bundle(folder)


def test_missing_and_unexpected_weights_are_named():
    with pytest.raises(UserError, match=r"a\.b is missing; c is not expected"):
        check_fit({"c": np.zeros(1)}, {"a": {"b": np.zeros(1)}}, "model")


def test_adapters_and_words_that_fit_nothing_are_named(small_bundle):
    pair = Factors(np.zeros((2, 32, 1)), np.zeros((2, 1, 32)))
    params = {
        **small_bundle.params,
        "adapters": {"denoiser": tree({QUERY: pair, ("blocks", "nose"): pair})},
        "added_tokens": {"text": np.zeros((1, 32)), "text_2": np.zeros((1, 32))},
    }
    with pytest.raises(
        UserError, match=r"adapters\.denoiser\.blocks\.nose fits.*added_tokens\.text_2 fits"
    ):
        check_params(params, small_bundle.spec, "model")


GOOD = Factors(np.zeros((2, 32, 3)), np.zeros((2, 3, 32)))


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"lora": {"down": GOOD.down}}, r"attention\.q\.lora\.up is missing: expected lora\.down"),
        ({"lora": {"up": GOOD.up}}, r"attention\.q\.lora\.down is missing"),
        ({"lora": GOOD._asdict() | {"alpha": GOOD.up}}, r"attention\.q\.lora\.alpha is unknown"),
        ({"lora": GOOD.up}, "is (missing|unknown): expected"),
        ({"lora": {"down": GOOD.down, "up": np.zeros((2, 4, 32))}}, "fits no layer"),
        ({"lora": {"down": GOOD.down, "up": GOOD.up[:1]}}, "fits no layer"),
        ({"lora": {"down": GOOD.down[0], "up": GOOD.up[0]}}, "fits no layer"),
        ({"lora": {"down": np.zeros(()), "up": np.zeros(())}}, "fits no layer"),
        (None, "adapters is not expected"),
    ],
)
def test_damaged_adapters_are_named(small_bundle, adapters, message):
    below = np.zeros(3) if adapters is None else {"denoiser": tree_at(QUERY, adapters)}
    with pytest.raises(UserError, match=message) as error:
        check_params({**small_bundle.params, "adapters": below}, small_bundle.spec, "model")
    assert "\n" not in str(error.value)


def test_nothing_is_written_half(small_bundle, tmp_path, monkeypatch):
    """A writer that dies leaves no specification without its weights."""
    renamed = type(epath.Path(tmp_path)).replace

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "model", small_bundle)
    assert not (tmp_path / "model" / "config.json").exists()
    with pytest.raises(UserError, match="holds no model"):
        load_bundle(tmp_path / "model")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", renamed)
    write_bundle(tmp_path / "model", small_bundle)
    assert sorted(p.name for p in (tmp_path / "model").iterdir() if p.name[0] != ".") == [
        "config.json",
        "model.safetensors",
        "tokenizers",
    ]


def test_the_fingerprint_sees_names_and_values():
    weights = {"a": np.ones(2, np.float32), "b": {"c": np.zeros(2, np.float32)}}
    same = {"b": {"c": np.zeros(2, np.float32)}, "a": np.ones(2, np.float32)}
    assert weights_fingerprint(weights) == weights_fingerprint(same)
    for other in (
        {"a": np.ones(2, np.float32), "b": {"d": np.zeros(2, np.float32)}},
        {"a": np.nextafter(np.ones(2, np.float32), 2), "b": {"c": np.zeros(2, np.float32)}},
    ):
        assert weights_fingerprint(other) != weights_fingerprint(weights)
        assert weights_fingerprint(other, dtype=np.float32) == weights_fingerprint(other)


def test_a_model_shares_a_fingerprint_with_its_exports(small_bundle, tmp_path):
    params = jax.tree.map(lambda x: np.asarray(x) * np.float32(1.001), small_bundle.params)
    for dtype in ("float32", "bfloat16"):
        write_bundle(tmp_path / dtype, small_bundle._replace(params=params), dtype)
        stored = load_bundle(tmp_path / dtype).params
        assert exported_fingerprint(stored) == exported_fingerprint(params)
    assert weights_fingerprint(stored) != weights_fingerprint(params)
    assert exported_fingerprint(small_bundle.params) != exported_fingerprint(params)


def test_a_model_that_ships_is_found_by_name():
    assert read_spec("shipped:produce") == read_spec(SHIPPED / "produce")
    with pytest.raises(UserError, match=r"no model shipped:prodce: .* shipped:produce"):
        load_bundle("shipped:prodce")


def test_an_exported_model_does_not_hide_a_run(small_bundle, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="is the folder of a run"):
        write_bundle(tmp_path, small_bundle)


def test_scalars_keep_their_shape(tmp_path):
    path = epath.Path(tmp_path / "model.safetensors")
    write_weights(path, {"logit_scale": np.float32(2.5)})
    assert read_weights(path)["logit_scale"].shape == ()


def test_what_ships_is_small_and_fits_its_specification():
    files = [path for path in Path(SHIPPED).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 45e6
    for config in Path(SHIPPED).glob("*/config.json"):
        load_bundle(f"shipped:{config.parent.name}")


def test_classes_of_third_parties_come_in_by_name(small_bundle, folder):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class MyDiT(type(small_bundle.spec.denoiser)):
        pass

    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["denoiser"]["type"] = "MyDiT"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="MyDiT"):
        load_bundle(folder)
    bundle = load_bundle(folder, types=[MyDiT])
    assert isinstance(bundle.spec.denoiser, MyDiT)
    assert_same(bundle.params, small_bundle.params)
