"""The denoiser's task: noise by the curriculum's level, heard prompts, frozen parts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxdiff.models.components import Latents, TextTower, TextualInversion

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import Autoencoder, AutoencoderConfig
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.layers import any_rngs, merge
from jaxdiff.models.lora import LoraConfig, factors
from jaxdiff.pretrained.load import read_pretrained
from jaxdiff.training.abstract import abstract_state
from jaxdiff.training.ema import Ema
from jaxdiff.training.step import init_state, structure
from jaxdiff.training.tasks.base import from_uint8
from jaxdiff.training.tasks.diffusion import NEGATIVE_BEAUTY, DiffusionTask, whole

BATCH = 8


@pytest.fixture(scope="module")
def task(tiny_recipe) -> DiffusionTask:
    return tiny_recipe().task


def random_params(build):
    """Weights away from their initial zeros, which would hide what lies behind them."""
    rng = np.random.default_rng(1)
    abstract = nnx.to_pure_dict(nnx.split(nnx.eval_shape(build))[1])
    return jax.tree.map(lambda p: jnp.asarray(0.1 * rng.normal(size=p.shape), p.dtype), abstract)


def make_batch():
    rng = np.random.default_rng(0)
    tokens = np.full((BATCH, 16), 599, np.int32)  # the end token, which also pads
    tokens[:, 0] = 598
    tokens[:, 1:5] = rng.integers(0, 598, (BATCH, 4))
    image = rng.integers(0, 256, (BATCH, 32, 32, 3), np.uint8)
    return {"image": image, "tokens": tokens, "framing": np.asarray(whole(32, 32, BATCH))}


@functools.cache
def compiled(task: DiffusionTask):
    """`run(level, key, batch)` -> (loss, metrics), gradient."""
    params = random_params(lambda: task.build(any_rngs()))

    @jax.jit
    def run(params, state, key, batch):
        def loss(params):
            return task.loss(nnx.merge(structure(task), params), {}, batch, key, state)

        return jax.value_and_grad(loss, has_aux=True)(params)

    def at(level: int, key: int = 0, batch=None):
        state = task.init_state()._replace(level=jnp.asarray(level, jnp.int32))
        batch = jax.tree.map(jnp.asarray, batch or make_batch())
        return run(params, state, jax.random.key(key), batch)

    return at


def test_training_starts_at_a_tenth_of_the_noise_and_the_state_says_so(task, tiny_recipe):
    state = task.init_state()
    assert float(task.curriculum.max_t(state)) == pytest.approx(0.1)
    in_the_run = abstract_state(tiny_recipe()).task_state
    assert jax.tree.structure(in_the_run) == jax.tree.structure(state)


@pytest.mark.parametrize("level", [1, 3])
def test_no_time_beyond_the_level_is_drawn(task, level):
    counts = np.zeros(10)
    for key in range(4):
        (_, metrics), _ = compiled(task)(level, key)
        counts += np.asarray(metrics["loss_by_level_count"])
    assert float(metrics["max_t"]) == pytest.approx(level / 10)
    assert counts.sum() == 4 * BATCH
    assert np.all(counts[:level] > 0)
    assert np.all(counts[level:] == 0)


def test_the_loss_is_the_mean_that_its_levels_add_up_to(task):
    (loss, metrics), _ = compiled(task)(10)
    np.testing.assert_allclose(metrics["loss_by_level_sum"].sum() / BATCH, loss, rtol=1e-5)
    assert float(metrics["loss"]) == float(loss)


def test_noise_is_the_keys_and_the_prompt_is_heard(task):
    (loss, _), gradient = compiled(task)(10)
    (again, _), _ = compiled(task)(10)
    assert float(again) == float(loss)
    assert float(compiled(task)(10, key=1)[0][0]) != float(loss)
    other = make_batch()
    other["tokens"][:, 1:5] = other["tokens"][::-1, 1:5]
    assert float(compiled(task)(10, batch=other)[0][0]) != float(loss)
    for part in ("text", "denoiser"):
        sizes = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient[part])]
        assert max(sizes) > 0


def test_the_level_rises_with_the_steps_taken(task):
    state = task.init_state()
    seen = []
    for _ in range(5):
        seen.append(int(state.level))
        state = task.next_state(state, {"loss": jnp.asarray(1.0)})
    assert seen == [1, 1, 2, 2, 3]


def test_without_a_curriculum_all_levels_are_drawn_from_the_start(task):
    plain = dataclasses.replace(task, curriculum=None)
    assert plain.init_state() == ()
    assert plain.next_state((), {"loss": jnp.zeros(())}) == ()
    batch = jax.tree.map(jnp.asarray, make_batch())

    def loss(params):
        model = nnx.merge(structure(plain), params)
        return plain.loss(model, {}, batch, jax.random.key(0), ())

    _, metrics = jax.eval_shape(loss, random_params(lambda: plain.build(any_rngs())))
    assert metrics.keys() == {"loss", "loss_by_level_sum", "loss_by_level_count"}


def test_pixels_are_in_minus_1_to_1():
    images = jnp.array([0, 255], jnp.uint8).reshape(2, 1, 1, 1).repeat(3, -1)
    np.testing.assert_allclose(from_uint8(images)[:, 0, 0], [[-1] * 3, [1] * 3])


def test_a_pretrained_text_tower_is_used_and_not_trained(task):
    text = dataclasses.replace(task.text, pretrained="runs/clip", trained=False)
    frozen_text = dataclasses.replace(task, text=text)
    model = nnx.eval_shape(lambda: frozen_text.build(any_rngs()))
    assert set(nnx.to_pure_dict(nnx.split(model)[1])) == {"denoiser"}
    part = frozen_text.frozen()["text"]
    assert (part.folder, part.part) == ("runs/clip", ("text",))
    params = random_params(part.build)
    ids = jnp.asarray(make_batch()["tokens"])
    found = jax.jit(
        lambda p: frozen_text.features(model, {"text": p}, ids, whole(8, 8, len(ids))).pooled
    )(params)
    expected = jax.jit(lambda p: merge(part.build, p)(ids).pooled)(params)
    np.testing.assert_array_equal(found, expected)


def test_a_text_tower_that_is_not_trained_stays_as_drawn(task):
    still = dataclasses.replace(task, text=dataclasses.replace(task.text, trained=False))
    model = nnx.eval_shape(lambda: still.build(any_rngs()))
    assert set(nnx.to_pure_dict(nnx.split(model)[1])) == {"denoiser"}
    drawn, again = (read_pretrained(still.frozen())["text"] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, drawn, again)
    assert not still.start()
    assert not task.start()


@pytest.mark.parametrize("name", ["text", "denoiser"])
def test_a_pretrained_part_can_learn_on(task, name):
    if name == "text":
        text = dataclasses.replace(task.text, pretrained="runs/earlier")
        learning = dataclasses.replace(task, text=text)
    else:
        learning = dataclasses.replace(task, pretrained="runs/earlier")
    assert not learning.frozen()
    assert set(learning.start()) == {name}
    part = learning.start()[name]
    assert (part.folder, part.part) == ("runs/earlier", (name,))
    weights = random_params(part.build)

    def start(weights):
        return init_state(learning, optax.sgd(0.1), Ema(), 0, {name: weights})

    state = jax.jit(start)(weights)
    for params in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, params[name], weights)
    drawn = jax.eval_shape(lambda: init_state(task, optax.sgd(0.1), Ema(), 0))
    assert jax.tree.structure(state.params) == jax.tree.structure(drawn.params)


def test_the_words_are_those_of_the_layer_that_the_recipe_names(task):
    text = dataclasses.replace(task.text, layer=0)
    words = dataclasses.replace(task, text=text)
    params = random_params(lambda: task.build(any_rngs()))
    ids = jnp.asarray(make_batch()["tokens"])

    def features(task, ids):
        return task.features(nnx.merge(structure(task), params), {}, ids, whole(8, 8, len(ids)))

    last, first = (jax.jit(functools.partial(features, t))(ids) for t in (task, words))
    np.testing.assert_array_equal(last.pooled, first.pooled)
    # The first hidden state of a word depends on what it is and where, not on what comes before.
    other = ids.at[:, 1].add(1)
    moved = jax.jit(functools.partial(features, words))(other)
    np.testing.assert_array_equal(moved.tokens[:, 2:], first.tokens[:, 2:])
    assert not np.allclose(jax.jit(functools.partial(features, task))(other).tokens, last.tokens)


@pytest.mark.parametrize(
    ("numbers", "told"),
    [(6, [90, 120, 0, 15, 32, 32]), (5, [90, 120, 0, 15, 2.5])],
    ids=["XL", "refiner"],
)
def test_xl_is_told_of_the_framing_and_its_refiner_of_beauty(task, numbers, told):
    denoiser = UNet2DConditionConfig(
        block_out_channels=(32,),
        transformer_layers=(1,),
        heads=(2,),
        in_channels=3,
        out_channels=3,
        cross_attention_dim=16,
        added_width=16 + 4 * numbers,
        time_id_width=4,
    )
    xl = dataclasses.replace(
        task, denoiser=denoiser, text=dataclasses.replace(task.text, trained=False)
    )
    params = random_params(xl.frozen()["text"].build)
    ids = jnp.asarray(make_batch()["tokens"])
    framing = jnp.tile(jnp.array([90, 120, 0, 15, 32, 32]), (BATCH, 1))
    model = nnx.eval_shape(lambda: xl.build(nnx.Rngs(0)))
    run = jax.jit(lambda p: xl.features(model, {"text": p}, ids, framing, NEGATIVE_BEAUTY))
    conditions = run(params)
    np.testing.assert_array_equal(conditions.time_ids, np.tile(told, (BATCH, 1)))
    assert conditions.pooled.shape == (BATCH, 16)


def test_adapters_need_something_to_adapt(task):
    with pytest.raises(UserError, match="need a denoiser that is trained already"):
        dataclasses.replace(task, lora=LoraConfig())
    text = dataclasses.replace(task.text, lora=LoraConfig())
    with pytest.raises(UserError, match="adapts a text encoder that is trained already"):
        dataclasses.replace(task, text=text)


def test_a_text_encoders_adapters_alone_are_trained_and_start_without_effect(task):
    lora = LoraConfig(rank=2, targets=("q", "mlp_in"))
    text = dataclasses.replace(task.text, pretrained="runs/earlier", lora=lora)
    adapted = dataclasses.replace(task, text=text)
    assert not adapted.start()
    assert set(adapted.frozen()) == {"text"}
    drawn = jax.jit(lambda: nnx.to_pure_dict(nnx.split(adapted.build(nnx.Rngs(0)))[1]))()
    layers = factors(drawn["text"])
    assert set(layers) == {("blocks", "attention", "q"), ("blocks", "mlp_in")}
    assert len(jax.tree.leaves(drawn["text"])) == 4
    base = random_params(adapted.frozen()["text"].build)
    ids = jnp.asarray(make_batch()["tokens"])

    @jax.jit
    def tokens(params):
        model = nnx.merge(structure(adapted), params)
        return adapted.features(model, {"text": base}, ids, whole(8, 8, len(ids))).tokens

    without = task.text.read(merge(lambda: task.text.build(any_rngs()), base), ids).tokens
    np.testing.assert_allclose(tokens(drawn), without, atol=1e-5)
    moved = jax.tree.map(lambda x: x + 0.5, drawn)
    assert np.abs(tokens(moved) - without).max() > 0.1


def new_word(task, vectors=2):
    text = dataclasses.replace(task.text, trained=False, pretrained="runs/earlier")
    inversion = TextualInversion(word="<pea>", initial="red banana", vectors=vectors)
    return dataclasses.replace(task, text=text, pretrained="runs/earlier", inversion=inversion)


def test_of_a_new_word_its_vectors_alone_are_trained_and_start_as_others(task):
    inverted = new_word(task, vectors=3)
    assert not inverted.start()
    assert set(inverted.frozen()) == {"text", "denoiser"}
    tokenizer = Tokenizer.train(["a red banana"] * 9, vocab_size=600, length=16)
    table = np.random.default_rng(0).normal(size=(tokenizer.vocab_size, 16)).astype(np.float32)
    red, banana = tokenizer(["red banana"])[0, 1:3]
    longer = tokenizer.with_word("<pea>", 3)
    derived = inverted.derive({"text": {"token_embedding": table}}, longer)
    np.testing.assert_array_equal(derived["words"]["text"], table[[red, banana, red]])
    drawn = jax.eval_shape(lambda: init_state(inverted, optax.sgd(0.1), Ema(), 0)).params
    assert jax.tree.map(np.shape, derived) == jax.tree.map(lambda x: x.shape, drawn)
    with pytest.raises(UserError, match="new words need as many"):
        inverted.derive({"text": {"token_embedding": table[:-1]}}, longer)


def test_a_new_word_moves_the_loss_and_stands_where_the_prompt_has_it(task):
    inverted = new_word(task)
    params = random_params(lambda: inverted.build(any_rngs()))
    frozen = {name: random_params(part.build) for name, part in inverted.frozen().items()}
    with_word, without = make_batch(), make_batch()
    with_word["tokens"][:, 2:4] = [600, 601]

    @jax.jit
    def gradient(params, batch):
        def loss(params):
            model = nnx.merge(structure(inverted), params)
            return inverted.loss(model, frozen, batch, jax.random.key(0), inverted.init_state())[0]

        return jax.grad(loss)(params)

    assert np.all(np.abs(gradient(params, with_word)["words"]["text"]).max(-1) > 0)
    assert not np.any(gradient(params, without)["words"]["text"])
    # The prompt's end is found although it is no longer the greatest id.
    model = nnx.merge(structure(inverted), params)
    features = inverted.features(
        model, frozen, jnp.asarray(with_word["tokens"]), whole(8, 8, BATCH)
    )
    np.testing.assert_array_equal(features.mask.sum(1), [6] * BATCH)


def test_a_new_word_is_for_text_encoders_that_stay_as_they_are(task):
    with pytest.raises(UserError, match=r"set task\.text\.trained to False"):
        dataclasses.replace(new_word(task), text=task.text)
    for wrong in ({"vectors": 0}, {"initial": " "}):
        with pytest.raises(UserError, match="a word to start from"):
            TextualInversion(**wrong)


def test_latents_are_what_is_modelled_where_there_is_an_autoencoder(task):
    model = AutoencoderConfig(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=6
    )
    denoiser = dataclasses.replace(task.denoiser, channels=6, patch_size=2)
    latent = dataclasses.replace(
        task, denoiser=denoiser, latents=Latents(model=model, pretrained="runs/autoencoder")
    )
    part = latent.frozen()["autoencoder"]
    assert (part.folder, part.part) == ("runs/autoencoder", ())
    frozen = {"autoencoder": nnx.to_pure_dict(nnx.split(nnx.eval_shape(part.build))[1])}
    assert isinstance(nnx.eval_shape(part.build), Autoencoder)
    images = jax.ShapeDtypeStruct((2, 32, 16, 3), jnp.float32)
    x = jax.eval_shape(latent.encode, frozen, images, jax.random.key(0))
    assert x.shape == (2, *latent.shape(32, 16)) == (2, 16, 8, 6)
    assert jax.eval_shape(latent.decode, frozen, x).shape == images.shape
    assert task.shape(32, 16) == (32, 16, 3)


def test_parts_that_do_not_fit_each_other_are_refused(task):
    wider = dataclasses.replace(task.text.model, projection_dim=24)
    with pytest.raises(
        UserError, match=r"widths 16 and 16 .* 16 and 24; make denoiser\.text_width"
    ):
        dataclasses.replace(task, text=TextTower(model=wider))
    with pytest.raises(UserError, match=r"works on 4 channels .* set denoiser\.channels to 3"):
        dataclasses.replace(task, denoiser=dataclasses.replace(task.denoiser, channels=4))
