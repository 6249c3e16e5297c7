"""Training a denoiser: noise by the curriculum's level, text, frozen parts, adapters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.conditioning import (
    ClipTextEncoder,
    StableDiffusionXLConditioner,
    TextInputs,
    full_size_crop,
)
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.layers import abstract_params, bind_params
from jaxdiff.models.lora import LoraConfig, factors
from jaxdiff.training.abstract import abstract_state
from jaxdiff.training.ema import Ema
from jaxdiff.training.initial_weights import abstract_frozen_params, load_parts
from jaxdiff.training.step import init_state
from jaxdiff.training.tasks.diffusion import (
    DiffusionTask,
    Pretrained,
    TextualInversion,
    Trainable,
)

BATCH = 8
KEYS = RowKeys.whole(jax.random.key(0), BATCH)


@pytest.fixture(scope="module")
def task(tiny_recipe) -> DiffusionTask:
    return tiny_recipe().task


def random_like(abstract):
    """Weights away from their initial zeros, which would hide what lies behind them."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(0.1 * rng.normal(size=p.shape), p.dtype), abstract)


def abstract_trained(task):
    return jax.eval_shape(lambda: task.init_params(nnx.Rngs(0)))


def make_ids():
    rng = np.random.default_rng(0)
    ids = np.full((BATCH, 16), 599, np.int32)  # the end token, which also pads
    ids[:, 0] = 598
    ids[:, 1:5] = rng.integers(0, 598, (BATCH, 4))
    return ids


def make_batch(ids=None, names=("text",)):
    image = np.random.default_rng(1).integers(0, 256, (BATCH, 32, 32, 3), np.uint8)
    ids = make_ids() if ids is None else ids
    text = TextInputs(dict.fromkeys(names, ids), np.zeros(BATCH, bool))
    return {"image": image, "text": text, "size_crop": np.asarray(full_size_crop(32, 32, BATCH))}


@functools.cache
def compiled(task: DiffusionTask):
    """`run(level, key, batch)` -> (loss, metrics), gradient."""
    params = random_like(abstract_trained(task))

    @jax.jit
    def run(params, state, key, batch):
        def loss(params):
            keys = RowKeys.whole(key, BATCH)
            value, metrics, _ = task.loss(params, {}, batch, keys, state, params)
            return value, metrics

        return jax.value_and_grad(loss, has_aux=True)(params)

    def at(level: int, key: int = 0, batch=None):
        curriculum, state = task.init_state()
        curriculum = curriculum._replace(level=jnp.asarray(level, jnp.int32))
        batch = jax.tree.map(jnp.asarray, batch or make_batch())
        return run(params, (curriculum, state), jax.random.key(key), batch)

    return at


def test_training_starts_at_a_tenth_of_the_noise_as_the_state_states(task, tiny_recipe):
    curriculum, _ = task.init_state()
    assert float(task.curriculum.max_t(curriculum)) == pytest.approx(0.1)
    in_the_run = abstract_state(tiny_recipe()).task_state
    assert jax.tree.structure(in_the_run) == jax.tree.structure(task.init_state())


@pytest.mark.parametrize("level", [1, 3])
def test_no_time_beyond_the_level_is_sampled(task, level):
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


def test_the_loss_depends_on_the_key_and_the_prompt(task):
    (loss, _), gradient = compiled(task)(10)
    (again, _), _ = compiled(task)(10)
    assert float(again) == float(loss)
    assert float(compiled(task)(10, key=1)[0][0]) != float(loss)
    other = make_ids()
    other[:, 1:5] = other[::-1, 1:5]
    assert float(compiled(task)(10, batch=make_batch(other))[0][0]) != float(loss)
    for part in ("text_encoders", "denoiser"):
        sizes = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient[part])]
        assert max(sizes) > 0


def test_the_level_rises_with_the_steps_taken(task):
    state = task.init_state()
    seen = []
    for _ in range(5):
        seen.append(int(state[0].level))
        state = task.next_state(state, {"loss": jnp.asarray(1.0)})
    assert seen == [1, 1, 2, 2, 3]


def test_without_a_curriculum_all_levels_are_sampled_from_the_start(task):
    plain = dataclasses.replace(task, curriculum=None)
    assert plain.init_state() == ((), ())
    assert plain.next_state(((), ()), {"loss": jnp.zeros(())}) == ((), ())
    batch = jax.tree.map(jnp.asarray, make_batch())

    def loss(params):
        return plain.loss(params, {}, batch, KEYS, plain.init_state(), params)

    _, metrics, state = jax.eval_shape(loss, random_like(abstract_trained(plain)))
    assert metrics.keys() == {"loss", "loss_by_level_sum", "loss_by_level_count"}
    assert state == ((), ())


def test_frozen_pretrained_text_encoders_are_used_and_not_trained(task):
    frozen_text = dataclasses.replace(
        task, trainable=Trainable(), pretrained=Pretrained(text_encoders="runs/clip")
    )
    assert set(abstract_trained(frozen_text)) == {"denoiser"}
    part = frozen_text.frozen_parts()["text_encoders", "text"]
    assert part.folder == "runs/clip"
    params = random_like(abstract_params(part.build))
    trained = random_like(abstract_trained(frozen_text))
    full = frozen_text.model_params(trained, {"text_encoders": {"text": params}})
    ids = jnp.asarray(make_ids())
    text = jax.tree.map(jnp.asarray, make_batch()["text"])
    found = jax.jit(lambda p: frozen_text.model.encode_text(p, text).pooled)(full)
    expected = jax.jit(lambda p: bind_params(part.build, p)(ids).pooled)(params)
    np.testing.assert_array_equal(found, expected)


def test_a_text_encoder_that_is_not_trained_stays_as_initialised(task):
    still = dataclasses.replace(task, trainable=Trainable())
    assert set(abstract_trained(still)) == {"denoiser"}
    one, again = (load_parts(still.frozen_parts()) for _ in range(2))
    assert set(one["text_encoders"]) == {"text"}
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert not still.initial_parts()
    assert not task.initial_parts()


@pytest.mark.parametrize("path", [("text_encoders", "text"), ("denoiser",)])
def test_a_pretrained_part_can_be_trained_further(task, path):
    learning = dataclasses.replace(task, pretrained=Pretrained(**{path[0]: "runs/earlier"}))
    assert not learning.frozen_parts()
    assert set(learning.initial_parts()) == {path}
    part = learning.initial_parts()[path]
    assert part.folder == "runs/earlier"
    weights = random_like(abstract_params(part.build))
    tree = {path[0]: {path[1]: weights} if len(path) > 1 else weights}

    def start(tree):
        return init_state(learning, optax.sgd(0.1), Ema(), 0, tree)

    state = jax.jit(start)(tree)
    for params in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, params[path[0]], tree[path[0]])
    fresh = jax.eval_shape(lambda: init_state(task, optax.sgd(0.1), Ema(), 0))
    assert jax.tree.structure(state.params) == jax.tree.structure(fresh.params)


def test_xl_reads_the_size_and_crop_of_each_image(task):
    text = ClipTextEncoder(model=task.model.conditioner.text.model)
    denoiser = UNet2DConditionConfig(
        block_out_channels=(32,),
        transformer_layers=(1,),
        heads=(2,),
        in_channels=3,
        out_channels=3,
        cross_attention_dim=32,
        norm_num_groups=4,  # of several channels, or they would subtract the time's
        added_width=16 + 4 * 6,
        time_id_width=4,
    )
    conditioner = StableDiffusionXLConditioner(text=text, text_2=text)
    model = dataclasses.replace(task.model, denoiser=denoiser, conditioner=conditioner)
    xl = dataclasses.replace(task, model=model, trainable=Trainable(), curriculum=None)
    params = random_like(abstract_trained(xl))
    frozen = random_like(abstract_frozen_params(xl))

    @jax.jit
    def loss(batch):
        return xl.loss(params, frozen, batch, KEYS, xl.init_state(), params)[0]

    batch = make_batch(names=("text", "text_2"))
    cropped = batch | {"size_crop": batch["size_crop"] + np.array([9, 9, 0, 15, 0, 0])}
    assert abs(float(loss(batch)) - float(loss(cropped))) > 1e-6


def test_adapters_need_something_to_adapt(task):
    with pytest.raises(UserError, match="need a trained denoiser"):
        dataclasses.replace(task, trainable=Trainable(lora=LoraConfig()))
    with pytest.raises(UserError, match="adapts text encoders that are trained already"):
        dataclasses.replace(task, trainable=Trainable(text_lora=LoraConfig()))


def test_adapters_of_text_encoders_alone_are_trained_and_start_without_effect(task):
    lora = LoraConfig(rank=2, targets=("q", "mlp_in"))
    adapted = dataclasses.replace(
        task,
        pretrained=Pretrained(text_encoders="runs/earlier"),
        trainable=Trainable(text_lora=lora),
    )
    assert not adapted.initial_parts()
    assert set(adapted.frozen_parts()) == {("text_encoders", "text")}
    initial = jax.jit(lambda: adapted.init_params(nnx.Rngs(0)))()
    assert set(initial) == {"denoiser", "adapters"}
    adapters = initial["adapters"]["text_encoders"]["text"]
    assert set(factors(adapters)) == {("blocks", "attention", "q"), ("blocks", "mlp_in")}
    assert len(jax.tree.leaves(adapters)) == 4
    base = random_like(abstract_frozen_params(adapted))
    text = jax.tree.map(jnp.asarray, make_batch()["text"])

    @jax.jit
    def tokens(params):
        return adapted.model.encode_text(adapted.model_params(params, base), text).tokens

    without = jax.jit(lambda p: adapted.model.encode_text(p, text).tokens)(base)
    np.testing.assert_allclose(tokens(initial), without, atol=1e-5)
    moved = jax.tree.map(lambda x: x + 0.5, initial)
    assert np.abs(tokens(moved) - without).max() > 0.1


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_adapters_of_the_denoiser_are_trained_at_their_scale(task, alpha):
    lora = LoraConfig(rank=2, alpha=alpha)
    adapted = dataclasses.replace(
        task, pretrained=Pretrained(denoiser="runs/earlier"), trainable=Trainable(lora=lora)
    )
    assert set(adapted.frozen_parts()) == {("denoiser",), ("text_encoders", "text")}
    params = random_like(abstract_trained(adapted))
    assert set(params) == {"adapters"}
    full = adapted.model_params(params, random_like(abstract_frozen_params(adapted)))
    assert set(full) == {"denoiser", "text_encoders", "adapters"}
    scaled, stored = (factors(tree["adapters"]["denoiser"]) for tree in (full, params))
    factor = 1 if alpha is None else 0.5
    for path, pair in stored.items():
        np.testing.assert_allclose(scaled[path].up, factor * pair.up, rtol=1e-6)


def new_word(task, vectors=2):
    return dataclasses.replace(
        task,
        pretrained=Pretrained(denoiser="runs/earlier", text_encoders="runs/earlier"),
        trainable=Trainable(
            inversion=TextualInversion(word="<pea>", initial="red banana", vectors=vectors)
        ),
    )


def test_the_embeddings_of_a_new_token_alone_are_trained_and_start_as_others(task):
    inverted = new_word(task, vectors=3)
    assert not inverted.initial_parts()
    assert set(inverted.frozen_parts()) == {("text_encoders", "text"), ("denoiser",)}
    tokenizer = Tokenizer.train(["a red banana"] * 9, vocab_size=600, length=16)
    table = np.random.default_rng(0).normal(size=(tokenizer.vocab_size, 16)).astype(np.float32)
    red, banana = tokenizer(["red banana"])[0, 1:3]
    longer = {"text": tokenizer.with_word("<pea>", 3)}
    frozen = {"text_encoders": {"text": {"token_embedding": table}}}
    initial = inverted.init_from_frozen(frozen, longer)
    np.testing.assert_array_equal(initial["added_tokens"]["text"], table[[red, banana, red]])
    fresh = jax.eval_shape(lambda: init_state(inverted, optax.sgd(0.1), Ema(), 0)).params
    assert jax.tree.map(np.shape, initial) == jax.tree.map(lambda x: x.shape, fresh)
    short = {"text_encoders": {"text": {"token_embedding": table[:-1]}}}
    with pytest.raises(UserError, match="new tokens need equal numbers"):
        inverted.init_from_frozen(short, longer)


def test_a_new_token_changes_the_loss_of_prompts_that_contain_it(task):
    inverted = new_word(task)
    params = random_like(abstract_trained(inverted))
    frozen = random_like(abstract_frozen_params(inverted))
    with_word, without = make_ids(), make_ids()
    with_word[:, 2:4] = [600, 601]

    @jax.jit
    def gradient(params, batch):
        def loss(params):
            state = inverted.init_state()
            return inverted.loss(params, frozen, batch, KEYS, state, params)[0]

        return jax.grad(loss)(params)

    found = gradient(params, make_batch(with_word))["added_tokens"]["text"]
    assert np.all(np.abs(found).max(-1) > 0)
    assert not np.any(gradient(params, make_batch(without))["added_tokens"]["text"])
    # The prompt's end is found although it is no longer the greatest id.
    full = inverted.model_params(params, frozen)
    text = jax.tree.map(jnp.asarray, make_batch(with_word)["text"])
    mask = jax.jit(lambda p: inverted.model.encode_text(p, text).mask)(full)
    np.testing.assert_array_equal(mask.sum(1), [6] * BATCH)


def test_textual_inversion_is_for_frozen_text_encoders(task):
    inverted = new_word(task)
    trainable = dataclasses.replace(inverted.trainable, text_encoders=True)
    with pytest.raises(UserError, match=r"set task\.trainable\.text_encoders to False"):
        dataclasses.replace(inverted, trainable=trainable)
    for wrong, message in (({"vectors": 0}, "at least 1"), ({"initial": " "}, "is empty")):
        with pytest.raises(UserError, match=message):
            TextualInversion(**wrong)


def test_a_model_on_latents_needs_a_trained_autoencoder(task):
    autoencoder = AutoencoderConfig(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=6
    )
    denoiser = dataclasses.replace(task.model.denoiser, channels=6, patch_size=2)
    model = dataclasses.replace(task.model, denoiser=denoiser, autoencoder=autoencoder)
    with pytest.raises(UserError, match=r"name a trained autoencoder in task\.pretrained"):
        dataclasses.replace(task, model=model)
    latent = dataclasses.replace(
        task, model=model, pretrained=Pretrained(autoencoder="runs/autoencoder")
    )
    part = latent.frozen_parts()["autoencoder",]
    assert part.folder == "runs/autoencoder"
    frozen = random_like(abstract_frozen_params(latent))
    images = make_batch()["image"][:2]
    x0 = jax.eval_shape(latent.x0, frozen, {"image": images}, RowKeys.whole(jax.random.key(0), 2))
    assert x0.shape == (2, *latent.model.latent_shape(32, 32)) == (2, 16, 16, 6)
    # The image and the cached moments of the image cost the autoencoder's encoder, or nothing.
    online, cached = (latent.flops_per_image(32, latents=latents) for latents in (False, True))
    assert online - cached == autoencoder.encode_flops(height=32, width=32)


def test_tokenizers_that_do_not_fit_are_refused(task):
    fits = Tokenizer.train(["a red banana"], vocab_size=600, length=16)
    task.check_tokenizers({"text": fits})
    with pytest.raises(UserError, match="The tokenizer gives 8 tokens"):
        task.check_tokenizers({"text": Tokenizer.train(["a"], vocab_size=600, length=8)})
    assert set(task.conditioner.encoders) == {"text"}


def test_dropped_captions_are_absent(task):
    tokenizer = Tokenizer.train(["a red banana"], vocab_size=600, length=16)
    inputs = task.tokenize({"text": tokenizer})(["a banana", ""])
    np.testing.assert_array_equal(inputs.absent, [False, True])
    np.testing.assert_array_equal(inputs.ids["text"], tokenizer(["a banana", ""]))
    abstract = task.abstract_text(2)
    assert jax.tree.structure(abstract) == jax.tree.structure(inputs)


def test_frozen_parts_get_no_gradient_and_cost_less(task):
    frozen_text = dataclasses.replace(task, trainable=Trainable())
    text = task.model.conditioner.flops()
    assert task.flops_per_image(32) - frozen_text.flops_per_image(32) == pytest.approx(2 * text)
    without = frozen_text.flops_per_image(32, text=True)
    assert frozen_text.flops_per_image(32) - without == pytest.approx(text)
    inverted = new_word(task)
    assert inverted.flops_per_image(32) == pytest.approx(2 * task.denoiser_flops(32) + 2 * text)
