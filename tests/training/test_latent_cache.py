"""Latents and text cached ahead, and the training from them."""

import dataclasses
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from PIL import Image

from jaxdiff.data.buckets import Buckets
from jaxdiff.data.held_out import split_records
from jaxdiff.data.loader import ON_DEVICE, DataConfig, make_dataset
from jaxdiff.data.shards import EMPTY
from jaxdiff.data.sources.cached_latents import CachedLatents, LatentOptions
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.data.transforms import Transforms
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.conditioning import ClipTextEncoder, StableDiffusionXLConditioner
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.layers import abstract_params, bind_init, bind_params
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_to_image import from_uint8
from jaxdiff.pretrained.bundle import Bundle, write_bundle
from jaxdiff.training import held_out, loop
from jaxdiff.training.abstract import (
    abstract_batch,
    abstract_frozen,
    flops_per_image,
    host_parts,
)
from jaxdiff.training.cached_latents import check_cache, check_encoders
from jaxdiff.training.initial_weights import load_parts
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.prepare_shards import Sharing, with_cache, write_records
from jaxdiff.training.recipe import Config, TrainConfig
from jaxdiff.training.tasks.diffusion import DiffusionTask, Pretrained, Trainable
from jaxdiff.training.workdir import CACHE, open_run

MODEL = AutoencoderConfig(
    latent_channels=4,
    block_out_channels=(4, 8),
    layers_per_block=1,
    norm_num_groups=2,
    patch_size=2,
    shift_factor=0.1,
    scaling_factor=0.7,
)
LENGTH, BATCH = 20, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("latents")


def _random(abstract, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), abstract)


def _autoencoder(path, seed):
    params = _random(abstract_params(bind_init(AutoencoderConfig.build, MODEL)), seed)
    write_bundle(path, Bundle(MODEL, params, {}), "float32")
    return str(path)


@pytest.fixture(scope="module")
def config(tiny_recipe, folder) -> Config:
    """The tiny recipe on latents, encoded online."""
    recipe = tiny_recipe()
    model = recipe.task.model
    denoiser = dataclasses.replace(model.denoiser, channels=4, patch_size=2)
    model = dataclasses.replace(model, denoiser=denoiser, autoencoder=MODEL)
    pretrained = Pretrained(autoencoder=_autoencoder(folder / "autoencoder", 0))
    task = dataclasses.replace(recipe.task, model=model, pretrained=pretrained)
    return dataclasses.replace(recipe, task=task, data=_data(Produce(size=32, length=LENGTH)))


def _data(source, **transforms):
    return DataConfig(source=source, transforms=Transforms(size=32, **transforms))


def _cache(config, out, **options):
    settings = {"views": 1, "dtype": "float32", "batch_size": 2} | options
    sharing = Sharing(shards=2, workers=0, latents=LatentOptions(**settings))
    write_records(config, config.data, str(out), sharing)
    source = CachedLatents(path=str(out), of=config.data.source)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))


@pytest.fixture(scope="module")
def cached(config, folder) -> Config:
    return _cache(config, folder / "cached")


@pytest.mark.nightly
@pytest.mark.skipif(find_spec("apache_beam") is None, reason="needs the extra beam")
def test_latents_that_beam_writes_have_the_same_bytes(config, cached, folder):
    options = LatentOptions(views=1, dtype="float32", batch_size=2)
    sharing = Sharing(shards=2, runner="DirectRunner", latents=options)
    write_records(config, config.data, str(folder / "beam"), sharing)
    names = [path.name for path in (folder / "cached").iterdir() if path.is_file()]
    assert len([name for name in names if name.endswith(".array_record")]) == 2
    for name in names:
        assert (folder / "beam" / name).read_bytes() == (folder / "cached" / name).read_bytes()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a small red pea"] * 9, vocab_size=600, length=16)


def _batches(config, tokenizer, count):
    tokenize = config.task.tokenize(_tokenizers(config.task, tokenizer))
    data = make_dataset(config.data, tokenize, batch_size=BATCH, seed=3)
    batches = [batch for batch, _ in zip(data, range(count), strict=False)]
    arrays = [{k: b[k] for k in ON_DEVICE if k in b} for b in batches]
    return batches, jax.tree.map(jnp.asarray, arrays)


def _tokenizers(task, tokenizer):
    return dict.fromkeys(task.conditioner.encoders, tokenizer)


def test_training_from_cached_latents_gives_the_loss_of_encoding_online(
    config, cached, folder, tokenizer
):
    half = _cache(config, folder / "half", dtype="float16")
    task = config.task
    params = jax.jit(lambda: task.init_params(nnx.Rngs(0)))()
    # Away from the zeros that a denoiser's last layer starts with, behind which all is the same.
    params = jax.tree.map(lambda p: p + 0.02, params)
    frozen = load_parts(task.frozen_parts())

    @jax.jit
    def loss(batch, key):
        keys = RowKeys.whole(key, len(batch["size_crop"]))
        return task.loss(params, frozen, batch, keys, task.init_state(), params)[0]

    losses = {}
    for name, recipe in (("online", config), ("cached", cached), ("half", half)):
        _, batches = _batches(recipe, tokenizer, 4)
        for batch in batches:  # in one type, so that one program does for both
            if "latents" in batch:
                batch["latents"] = batch["latents"].astype(jnp.float32)
        losses[name] = [float(loss(batch, jax.random.key(i))) for i, batch in enumerate(batches)]
    np.testing.assert_allclose(losses["cached"], losses["online"], rtol=1e-6)
    np.testing.assert_allclose(losses["half"], losses["online"], rtol=1e-3)
    assert len(set(losses["online"])) == 4


def _with_frozen_text(task, folder, tokenizer) -> DiffusionTask:
    """The task with text encoders that are frozen, of a model that is written into `folder`."""
    params = _random(task.model.abstract_params(), 1)
    write_bundle(folder, Bundle(task.model, params, _tokenizers(task, tokenizer)))
    pretrained = dataclasses.replace(task.pretrained, text_encoders=str(folder))
    return dataclasses.replace(task, pretrained=pretrained, trainable=Trainable())


@pytest.fixture(scope="module")
def conditioned(config, folder, tokenizer) -> dict[str, Config]:
    """Recipes with frozen text encoders: one as by default, two as Stable Diffusion XL has."""
    replace, model = dataclasses.replace, config.task.model
    one = replace(model.conditioner.text, hidden_layer=0)
    text = ClipTextConfig(vocab_size=600, length=16, width=8, depth=2, heads=2, projection_dim=8)
    two = ClipTextEncoder(model=text, hidden_layer=-2, final_norm=False)
    unet = UNet2DConditionConfig(
        block_out_channels=(8, 16),
        layers_per_block=1,
        transformer_layers=(1, 0),
        heads=(2, 2),
        cross_attention_dim=24,
        norm_num_groups=4,
        added_width=8 + 6 * 4,
        time_id_width=4,
    )
    xl = StableDiffusionXLConditioner(text=model.conditioner.text, text_2=two)
    models = {
        "produce": replace(model, conditioner=replace(model.conditioner, text=one)),
        "SDXL": replace(model, denoiser=unet, conditioner=xl),
    }
    data = _data(Produce(size=32, length=LENGTH), caption_dropout=0.4)
    return {
        name: replace(
            config,
            data=data,
            task=_with_frozen_text(replace(config.task, model=model), folder / name, tokenizer),
        )
        for name, model in models.items()
    }


@pytest.mark.parametrize("name", ["produce", "SDXL"])
def test_training_from_cached_text_gives_the_loss_of_encoding_it_online(
    name, conditioned, folder, tokenizer
):
    config = conditioned[name]
    task, frozen = config.task, load_parts(config.task.frozen_parts())
    params = _random(jax.eval_shape(lambda: task.init_params(nnx.Rngs(0))), 0)
    # With text encoders of NaN, which nothing reads but for the token embeddings.
    read = {**frozen, "text_encoders": jax.tree.map(lambda x: x * np.nan, frozen["text_encoders"])}
    if name == "produce":
        layers = read["text_encoders"]["text"]["blocks"]
        read["text_encoders"] = {"text": frozen["text_encoders"]["text"] | {"blocks": layers}}

    @jax.jit
    def loss(params, frozen, batch, key):
        keys = RowKeys.whole(key, len(batch["size_crop"]))
        return task.loss(params, frozen, batch, keys, task.init_state(), params)[0]

    def losses(recipe, frozen):
        _, batches = _batches(recipe, tokenizer, 3)
        for batch in batches:  # in one type, so that one program does for both
            floats = [name for name in ("latents", "text_features") if name in batch]
            batch |= {name: batch[name].astype(jnp.float32) for name in floats}
        keys = [jax.random.key(i) for i in range(3)]
        return [float(loss(params, frozen, *pair)) for pair in zip(batches, keys, strict=True)]

    online = losses(_cache(config, folder / f"{name} latents"), frozen)
    for dtype, close in (("float32", 1e-6), ("float16", 3e-3)):
        cached = _cache(config, folder / f"{name} {dtype}", text=True, dtype=dtype)
        check_cache(cached)
        check_encoders(cached, frozen, _tokenizers(task, tokenizer))
        np.testing.assert_allclose(losses(cached, read), online, rtol=close)
    assert len(set(online)) == 3
    batch = abstract_batch(
        dataclasses.replace(cached, train=TrainConfig(steps=1, batch_size=BATCH))
    )
    _, real = _batches(cached, tokenizer, 1)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), dict(one)) for one in (batch, real[0])]
    assert shapes[0] == shapes[1]
    assert batch["text_features"].shape == (BATCH, task.model.conditioner.packed_size)
    assert ("text_encoders" in host_parts(cached)) == (name == "SDXL")
    assert ("text_encoders" in abstract_frozen(cached)) == (name == "produce")
    assert flops_per_image(cached) < flops_per_image(_cache(config, folder / f"{name} latents"))


def test_text_of_other_encoders_or_of_trained_ones_is_refused(
    conditioned, folder, tokenizer, config
):
    cached = _cache(conditioned["produce"], folder / "conditioned", text=True)
    frozen, tokenizers = load_parts(cached.task.frozen_parts()), {"text": tokenizer}
    other = {**frozen, "text_encoders": jax.tree.map(lambda x: x + 1, frozen["text_encoders"])}
    with pytest.raises(UserError, match="with other text encoders, or another tokenizer"):
        check_encoders(cached, other, tokenizers)
    another = Tokenizer.train(["a large pea"], vocab_size=600, length=16)
    with pytest.raises(UserError, match="with other text encoders, or another tokenizer"):
        check_encoders(cached, frozen, {"text": another})
    trained = dataclasses.replace(cached, task=config.task)
    for refused in (lambda: check_cache(trained), lambda: _cache(config, folder / "no", text=True)):
        with pytest.raises(UserError, match="cached for trained text encoders that stay frozen"):
            refused()
    (folder / "conditioned" / EMPTY).unlink()
    with pytest.raises(UserError, match=f"lacks {EMPTY}"):
        check_cache(cached)


def test_records_are_the_moments_of_the_images_with_their_captions(config, cached):
    source, images_of = cached.data.source, config.data.source
    assert isinstance(source, CachedLatents)
    source.check()
    assert len(source) == LENGTH
    params = load_parts(config.task.frozen_parts())["autoencoder"]
    images = np.stack([images_of[i]["image"] for i in (0, 7, 19)])
    build = bind_init(AutoencoderConfig.build, MODEL)
    z = jax.jit(lambda x: bind_params(build, params).encode(from_uint8(x)))(images)
    for row, i in enumerate((0, 7, 19)):
        record = source[i]
        assert record["captions"] == images_of[i]["captions"]
        assert record["moments"].shape == (1, 8, 8, 8)
        np.testing.assert_allclose(record["moments"][0, ..., :4], z.mean[row], atol=1e-5)
        np.testing.assert_allclose(record["moments"][0, ..., 4:], z.logvar[row], atol=1e-5)


def test_the_same_preparation_ends_in_the_same_bytes_after_a_loss(config, cached, folder):
    there = {path.name: path.read_bytes() for path in (folder / "cached").iterdir()}
    (folder / "cached" / "records-00001-of-00002.array_record").unlink()
    with pytest.raises(UserError, match=r"1 of the 2 shards .* are missing"):
        CachedLatents(path=str(folder / "cached")).check()
    _cache(config, folder / "cached")
    assert {path.name: path.read_bytes() for path in (folder / "cached").iterdir()} == there


def test_a_preparation_goes_on_in_its_own_compute_type_alone(config, folder):
    """Batches of another size, which memory may ask for, change the last bits alone."""
    out = folder / "resumed"
    _cache(config, out)
    whole = CachedLatents(path=str(out))
    there = [whole[i]["moments"] for i in range(len(whole))]
    (out / "records-00001-of-00002.array_record").unlink()
    half = dataclasses.replace(config, train=dataclasses.replace(config.train, compute="bfloat16"))
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(
        UserError, match=r"\(train.compute is float32, now bfloat16\): choose another"
    ):
        _cache(half, out)
    assert sorted(path.name for path in out.iterdir()) == before
    _cache(config, out, batch_size=3)
    resumed = CachedLatents(path=str(out))
    for i, moments in enumerate(there):
        np.testing.assert_allclose(resumed[i]["moments"], moments, atol=1e-4)


def test_every_second_view_is_mirrored(config, folder, tokenizer):
    images = folder / "wide"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.integers(0, 256, (32, 64, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text("a pea")
    wide = _data(ImageFolder(path=str(images)), crop="random", flip=True)
    recipe = dataclasses.replace(config, data=wide)
    cropped = _cache(recipe, folder / "views", views=4)
    record = cropped.data.source[0]
    assert record["moments"].shape == (4, 8, 8, 8)
    # Two places, a quarter and three quarters of the way, each as it is and mirrored.
    assert record["size_crop"][:, 3].tolist() == [8, 24, 24, 8]
    batches, _ = _batches(cropped, tokenizer, 8)
    seen = {tuple(f) for b in batches for f in b["size_crop"].tolist()}
    assert {f[3] for f in seen} == {8, 24}
    views = {b["latents"][0].tobytes() for b in batches}
    assert len(views) > 4


def test_buckets_keep_their_shapes(config, folder, tokenizer):
    images = folder / "shapes"
    images.mkdir()
    for i in range(16):
        size = ((32, 32), (40, 24))[i % 2]
        Image.fromarray(np.full((*size, 3), i, np.uint8)).save(images / f"{i:02}.png")
        (images / f"{i:02}.txt").write_text(f"{i}")
    shaped = _data(ImageFolder(path=str(images)), buckets=Buckets(step=8))
    recipe = dataclasses.replace(config, data=shaped)
    source = _cache(recipe, folder / "buckets").data.source
    assert [source[i]["moments"].shape[1:3] for i in range(2)] == [(8, 8), (10, 6)]
    bucketed = dataclasses.replace(
        recipe, data=dataclasses.replace(shaped, source=source, shuffle=False)
    )
    batches, _ = _batches(bucketed, tokenizer, 4)
    assert [b["latents"].shape for b in batches[:2]] == [(8, 8, 8, 8), (8, 10, 6, 8)]
    expected = [source[i]["moments"][0] for i in range(1, 16, 2)]
    np.testing.assert_array_equal(batches[1]["latents"], expected)


def test_latents_of_another_autoencoder_or_data_or_crop_are_refused(
    config, cached, folder, tokenizer
):
    frozen = load_parts(config.task.frozen_parts())
    tokenizers = {"text": tokenizer}
    check_cache(cached)
    check_encoders(cached, frozen, tokenizers)
    decoder_alone = dict(frozen["autoencoder"])
    decoder_alone["decoder"] = jax.tree.map(lambda x: x + 1, decoder_alone["decoder"])
    check_encoders(cached, {"autoencoder": decoder_alone}, tokenizers)
    other = jax.tree.map(lambda x: x + 1, frozen)
    with pytest.raises(UserError, match="made by another autoencoder"):
        check_encoders(cached, other, tokenizers)
    source = dataclasses.replace(cached.data.source, of=Produce(size=32, length=LENGTH - 1))
    data = dataclasses.replace(cached.data, source=source)
    with pytest.raises(UserError, match="made of other data"):
        check_cache(dataclasses.replace(cached, data=data))
    flipped = dataclasses.replace(cached.data, transforms=Transforms(size=32, flip=True))
    with pytest.raises(UserError, match="cached with flip False but"):
        _batches(dataclasses.replace(cached, data=flipped), tokenizer, 1)


def test_tasks_without_latents_refuse_them(cached, tiny_recipe):
    pixels = dataclasses.replace(tiny_recipe(), data=cached.data)
    with pytest.raises(UserError, match="trains on images"):
        check_cache(pixels)


def test_impossible_settings_are_refused(config, cached, folder):
    with pytest.raises(UserError, match="views is -1"):
        _cache(config, folder / "none", views=-1)
    with pytest.raises(UserError, match=r"latents\.views is 0"):
        _cache(config, folder / "none", views=0, text=True)
    nameless = dataclasses.replace(cached.data.source, of=None)
    recipe = dataclasses.replace(cached, data=dataclasses.replace(cached.data, source=nameless))
    with pytest.raises(UserError, match=r"data\.source\.of does not say of what"):
        write_records(recipe, recipe.data, str(folder / "none"), Sharing())


def test_latents_are_held_out_with_their_images(config, cached):
    images, latents = (split_records(c.data.source, 0.5) for c in (config, cached))
    assert 0 < len(images[1]) < LENGTH
    for side in (0, 1):
        np.testing.assert_array_equal(latents[side], images[side])


def test_held_out_images_are_encoded_though_the_recipe_caches_text(
    conditioned, tokenizer, monkeypatch
):
    seen = []

    def metrics(params, frozen, batch, key, rows):
        seen.append((frozen.keys(), batch.keys()))
        return {"loss": np.ones(())}

    monkeypatch.setattr(held_out, "_jitted", lambda *_: metrics)
    config, replace = conditioned["SDXL"], dataclasses.replace  # its steps read no text encoders
    data = replace(config.data, held_out=0.5, cache=LatentOptions(views=1, text=True))
    config, mesh = replace(config, data=data), make_mesh(MeshConfig(data=1), jax.devices()[:1])
    frozen, tokenizers = {"text_encoders": {}}, _tokenizers(config.task, tokenizer)
    held_out.held_out_metrics(config, {}, frozen, tokenizers, mesh, 4, batch_size=4)
    ((parts, columns),) = seen
    assert parts == {"text_encoders"}
    assert columns == {"image", "text", "size_crop"}


def test_a_changed_recipe_keeps_cached_latents_and_asks_where_it_needs_others(config, folder):
    out = epath.Path(folder / "changed")
    cached = with_cache_of(config)
    open_run(cached, out, fresh=False, log=lambda _: None)
    with_cache(cached, out / CACHE)
    there = {path.name: path.read_bytes() for path in (out / CACHE).iterdir()}
    other = with_cache_of(dataclasses.replace(config, optimizer=AdamW(learning_rate=1e-3)))
    for fresh in (False, True):
        open_run(other, out, fresh=fresh, log=lambda _: None)
        with_cache(other, out / CACHE)
    crops = dataclasses.replace(config.data, transforms=Transforms(size=32, flip=True))
    flipped = with_cache_of(dataclasses.replace(config, data=crops))
    open_run(flipped, out, fresh=True, log=lambda _: None)
    with pytest.raises(UserError, match=r"changed/latents contains .*flip is False, now True"):
        with_cache(flipped, out / CACHE)
    assert {path.name: path.read_bytes() for path in (out / CACHE).iterdir()} == there


def with_cache_of(config):
    """Return a recipe that caches its latents."""
    options = LatentOptions(views=1, dtype="float32", batch_size=2)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, cache=options))


@pytest.mark.slow
def test_a_run_caches_its_own_latents_and_goes_on_from_them(config, cached, folder):
    def run(recipe, steps):
        train = TrainConfig(steps=steps, batch_size=BATCH, checkpoint_every=1)
        recipe = dataclasses.replace(recipe, train=train, optimizer=AdamW(learning_rate=1e-3))
        return loop.train(recipe, folder / recipe.name, log=lambda _: None).summary["fingerprint"]

    options = LatentOptions(views=1, dtype="float32", batch_size=2)
    data = dataclasses.replace(config.data, cache=options)
    own = dataclasses.replace(config, name="own", data=data)
    run(own, 1)
    shards = sorted((folder / "own" / CACHE).glob("records-*"))
    written = [path.stat().st_mtime_ns for path in shards]
    found = run(own, 2)
    assert written
    assert [path.stat().st_mtime_ns for path in shards] == written
    assert found == run(dataclasses.replace(cached, name="prepared"), 2)
    assert not (folder / "prepared" / CACHE).exists()
    assert flops_per_image(own) == flops_per_image(cached)
    shapes = [jax.tree.map(lambda x: x.shape, abstract_batch(one)) for one in (own, cached)]
    assert shapes[0] == shapes[1]


def test_uncachable_recipes_are_refused_before_an_earlier_run_is_removed(
    config, cached, conditioned, tiny_recipe, folder
):
    def refused(recipe, cache):
        data = dataclasses.replace(recipe.data, cache=cache)
        (folder / "earlier").mkdir(exist_ok=True)
        (folder / "earlier" / "config.json").touch()
        with pytest.raises(UserError) as error:
            loop.train(dataclasses.replace(recipe, data=data), folder / "earlier", fresh=True)
        assert (folder / "earlier" / "config.json").exists()
        return str(error.value)

    once = LatentOptions(views=1)
    assert "no autoencoder whose latents can be cached" in refused(tiny_recipe(), once)
    assert "which need no caching" in refused(cached, once)
    text = LatentOptions(views=1, text=True)
    assert "trained text encoders that stay frozen" in refused(config, text)
    assert "views is 0" in refused(conditioned["produce"], LatentOptions(text=True))


def test_words_of_the_captions_are_those_of_the_source_of_the_images(tmp_path):
    source = Produce(length=4)
    known = CachedLatents(path=str(tmp_path), of=source)
    assert known.vocabulary == source.vocabulary
    assert known.related_words == source.related_words
    unknown = CachedLatents(path=str(tmp_path))
    assert (unknown.vocabulary, unknown.related_words) == (None, {})
