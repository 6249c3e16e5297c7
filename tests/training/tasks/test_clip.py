import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.distributed.mesh import MeshConfig, batch_sharding, make_mesh
from jaxdiff.distributed.sharding import replicated, state_shardings
from jaxdiff.models.conditioning import TextInputs
from jaxdiff.models.layers import bind_init, bind_params
from jaxdiff.models.text_encoders.clip import (
    Clip,
    ClipConfig,
    ClipEmbeddings,
    ClipTextConfig,
    ClipVisionConfig,
)
from jaxdiff.models.text_to_image import from_uint8
from jaxdiff.training.ema import Ema
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.step import init_state, make_train_step
from jaxdiff.training.tasks.clip import ClipTask, contrastive_loss

BATCH = 8
OPTIMIZER = AdamW(learning_rate=3e-3).build(100)

_SIZES = {"width": 16, "depth": 2, "heads": 2, "projection_dim": 8}
CONFIG = ClipConfig(
    text=ClipTextConfig(vocab_size=16, length=5, **_SIZES),
    vision=ClipVisionConfig(image_size=8, patch_size=4, **_SIZES),
)


def text_of(ids: np.ndarray) -> TextInputs:
    return TextInputs({"text": ids}, np.zeros(len(ids), bool))


def make_batch() -> dict:
    """Noise images, each with a caption of its own."""
    rng = np.random.default_rng(0)
    ids = np.array([[0, 1 + i, 1 + (3 * i) % 8, 15, 15] for i in range(BATCH)], np.int32)
    return {"image": rng.integers(0, 256, (BATCH, 8, 8, 3), np.uint8), "text": text_of(ids)}


@functools.cache
def train_step():
    """The step, and the state that it starts from; one compiled program builds the state."""
    task = ClipTask(model=CONFIG)
    state = jax.jit(lambda: init_state(task, OPTIMIZER, Ema(), seed=0))()
    return make_train_step(task, OPTIMIZER, Ema()), state


@functools.cache
def on_one_device():
    step, state = train_step()
    step = jax.jit(step)
    history = []
    for _ in range(30):
        state, metrics = step(state, {}, make_batch())
        history.append(jax.device_get(metrics))
    return history


def unit_vectors(seed: int, count: int, width: int = 6) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def closed_form(image: np.ndarray, text: np.ndarray, scale: float, counted: np.ndarray) -> float:
    """The mean of -log p(own partner), over the pairs that count, one question at a time."""
    logits = scale * image.astype(np.float64) @ text.T
    surprises = []
    for i in range(len(logits)):
        for row, mask in ((logits[i], counted[i]), (logits[:, i], counted[:, i])):
            surprises.append(-np.log(np.exp(row[i]) / np.exp(row[mask]).sum()))
    return float(np.mean(surprises))


def embeddings(image: np.ndarray, text: np.ndarray, scale: float) -> ClipEmbeddings:
    return ClipEmbeddings(jnp.asarray(image), jnp.asarray(text), jnp.float32(scale))


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
def test_the_loss_is_the_symmetric_cross_entropy(scale):
    image, text = unit_vectors(1, 7), unit_vectors(2, 7)
    loss, _, _ = contrastive_loss(embeddings(image, text, scale))
    expected = closed_form(image, text, scale, np.ones((7, 7), bool))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_equal_embeddings_cost_the_logarithm_of_the_batch():
    same = np.tile(unit_vectors(0, 1), (7, 1))
    loss, _, _ = contrastive_loss(embeddings(same, same, 14.0))
    np.testing.assert_allclose(loss, np.log(7), rtol=1e-6)


def test_accuracies_are_the_fractions_of_nearest_partners_in_each_direction():
    x, y = np.eye(2, dtype=np.float32)
    # Both images lie nearest the first text; each text has its own image nearest.
    image = np.stack([x, (x + y) / np.sqrt(2)])
    text = np.stack([(x + 0.1 * y) / np.sqrt(1.01), y])
    text[1] = -x * 0.8 + y * 0.6
    _, to_text, to_image = contrastive_loss(embeddings(image, text, 5.0))
    assert (float(to_text), float(to_image)) == (0.5, 1.0)


@functools.cache
def losses_of_repeated_captions():
    """Images 0, 3 and 5 share a caption: the loss by whether that is masked, and the embeddings."""
    batch = make_batch()
    ids = batch["text"].ids["text"]
    ids[[3, 5]] = ids[0]

    @jax.jit
    def run(params, batch):
        model = bind_params(bind_init(Clip, CONFIG), params)
        losses = {}
        for masked in (True, False):
            task = ClipTask(model=CONFIG, mask_equal_captions=masked)
            keys = RowKeys.whole(jax.random.key(0), len(ids))
            losses[masked], _, _ = task.loss(params, {}, batch, keys, (), params)
        return losses, model(from_uint8(batch["image"]), batch["text"].ids["text"])

    return jax.device_get(run(train_step()[1].params, batch))


@pytest.mark.parametrize("masked", [True, False])
def test_images_of_equal_captions_are_negatives_of_each_other_only_if_not_masked(masked):
    losses, (image, text, scale) = losses_of_repeated_captions()
    counted = np.ones((BATCH, BATCH), bool)
    if masked:
        counted[np.ix_([0, 3, 5], [0, 3, 5])] = np.eye(3, dtype=bool)
    np.testing.assert_allclose(
        losses[masked], closed_form(image, text, float(scale), counted), rtol=1e-4
    )


def test_masked_pairs_get_no_gradient_and_make_none_infinite():
    ignored = jnp.zeros((3, 3), bool).at[0, 1].set(True).at[1, 0].set(True)

    def loss(image):
        text = jnp.asarray(unit_vectors(2, 3))
        return contrastive_loss(ClipEmbeddings(image, text, jnp.float32(5)), ignored)[0]

    def without(image):  # image 0 against the texts that count for it
        text = jnp.asarray(unit_vectors(2, 3))
        logits = 5 * image @ text.T
        rows = [jnp.array([0, 2]), jnp.array([1, 2]), jnp.array([0, 1, 2])]
        each = [
            jax.nn.logsumexp(logits[i, r]) + jax.nn.logsumexp(logits[r, i]) - 2 * logits[i, i]
            for i, r in enumerate(rows)
        ]
        return sum(each) / 6

    image = jnp.asarray(unit_vectors(1, 3))
    np.testing.assert_allclose(jax.grad(loss)(image), jax.grad(without)(image), atol=1e-5)


def test_a_few_steps_separate_the_pairs():
    history = on_one_device()
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["accuracy_image_to_text"] == history[-1]["accuracy_text_to_image"] == 1
    assert 1 < history[-1]["logit_scale"] <= 100


def test_negatives_come_from_all_devices():
    """Eight devices with an image each learn what one device with eight images learns."""
    mesh = make_mesh(MeshConfig(data=8))
    step, state = train_step()
    batch = jax.device_put(make_batch(), batch_sharding(mesh))
    placed = state_shardings(jax.eval_shape(lambda: state), mesh, {})
    state = jax.device_put(state, placed)
    step = jax.jit(step, out_shardings=(placed, replicated(mesh)))
    for expected in on_one_device()[:3]:
        state, metrics = step(state, {}, batch)
        assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-4)
        assert float(metrics["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=1e-3)
