import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.data.transforms import Transforms
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.distributed.mesh import MeshConfig, batch_sharding, make_mesh
from jaxdiff.distributed.sharding import replicated, state_shardings
from jaxdiff.errors import UserError
from jaxdiff.evaluation.samples import Reconstructions
from jaxdiff.models.autoencoders.kl import Autoencoder, AutoencoderConfig, Gaussian
from jaxdiff.models.layers import bind_params
from jaxdiff.models.text_encoders.clip import ClipVision, ClipVisionConfig
from jaxdiff.pretrained.bundle import Bundle, write_bundle
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.training.ema import Ema
from jaxdiff.training.initial_weights import load_parts
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.recipe import load_recipe
from jaxdiff.training.run import run_recipe
from jaxdiff.training.step import init_state, make_train_step
from jaxdiff.training.tasks import autoencoder as module
from jaxdiff.training.tasks.autoencoder import AutoencoderTask, Perceptual, psnr
from tests.test_recipes import ROOT

OPTIMIZER = AdamW(learning_rate=3e-3).build(100)
CONFIG = AutoencoderConfig(
    latent_channels=2, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2
)
VISION = ClipVisionConfig(image_size=12, patch_size=4, width=8, depth=2, heads=2)
PERCEPTUAL = Perceptual(model=VISION, pretrained="runs/clip", weight=0.5)
PERCEPTUAL_TASK = AutoencoderTask(model=CONFIG, l2_fraction=0.5, perceptual=PERCEPTUAL)


def make_batch() -> dict:
    """Eight images of one shade each."""
    shades = np.random.default_rng(0).integers(0, 256, (8, 1, 1, 3), np.uint8)
    return {"image": np.tile(shades, (1, 8, 8, 1)), "size_crop": np.zeros((8, 6), np.int32)}


def images() -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1, maxval=1)


@functools.cache
def vision_params() -> dict:
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(ClipVision(VISION, rngs=nnx.Rngs(3)))))()


@functools.cache
def train_step():
    """The step with all terms, and the state that it starts from."""
    task = PERCEPTUAL_TASK
    state = jax.jit(lambda: init_state(task, OPTIMIZER, Ema(), seed=0))()
    return make_train_step(task, OPTIMIZER, Ema()), state


@functools.cache
def on_one_device():
    step, state = train_step()
    step = jax.jit(step)
    history = []
    for _ in range(40):
        state, metrics = step(state, {"vision": vision_params()}, make_batch())
        history.append(jax.device_get(metrics))
    return history, state


class Fixed(Autoencoder):
    """Stands in for an autoencoder: moments and reconstruction are given."""

    def __init__(self, mean: jax.Array, logvar: jax.Array, decoded: jax.Array):
        self.gaussian = nnx.data(Gaussian(mean, logvar))
        self.decoded = nnx.data(decoded)

    def encode(self, images):
        return self.gaussian

    def decode(self, z):
        return self.decoded


def fixed(mean: float = 0.0, logvar: float = 0.0, error: float = 0.0):
    """The metrics of latents [2, 4, 4, 2] of these moments, and of a constant error."""
    batch = {"image": jnp.full((2, 8, 8, 3), 51, jnp.uint8)}  # -0.6 in [-1, 1]
    z = jnp.zeros((2, 4, 4, 2))
    return Fixed(z + mean, z + logvar, jnp.full((2, 8, 8, 3), -0.6 + error)), batch


def run(task: AutoencoderTask, model, batch: dict, monkeypatch) -> dict:
    """The metrics of a given autoencoder."""
    monkeypatch.setattr(module, "bind_params", lambda *_: model)
    keys = RowKeys.whole(jax.random.key(0), len(batch["image"]))
    loss, metrics, _ = task.loss({}, {}, batch, keys, (), {})
    assert float(loss) == float(metrics["loss"])
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("l2_fraction", [0.0, 0.25, 1.0])
def test_reconstruction_mixes_absolute_and_squared_error(l2_fraction, monkeypatch):
    task = AutoencoderTask(model=CONFIG, l2_fraction=l2_fraction, kl_weight=0.0)
    metrics = run(task, *fixed(error=0.3, mean=2.0), monkeypatch)
    expected = (1 - l2_fraction) * 0.3 + l2_fraction * 0.09
    assert metrics["reconstruction"] == pytest.approx(expected, rel=1e-5)
    assert metrics["loss"] == metrics["reconstruction"]


def test_kl_is_the_closed_form_per_value_of_the_image(monkeypatch):
    mean, std = 0.7, 0.2
    task = AutoencoderTask(model=CONFIG, kl_weight=3.0)
    metrics = run(task, *fixed(mean, 2 * np.log(std)), monkeypatch)
    each = np.log(1 / std) + (std**2 + mean**2) / 2 - 0.5  # of N(mean, std) from N(0, 1)
    assert metrics["kl"] == pytest.approx(each * (4 * 4 * 2) / (8 * 8 * 3), rel=1e-5)
    assert metrics["loss"] == pytest.approx(3 * metrics["kl"] + metrics["reconstruction"], rel=1e-5)


def test_the_stated_scale_gives_latents_of_mean_0_and_deviation_1(monkeypatch):
    z = 5 + 3 * jax.random.normal(jax.random.key(4), (2, 4, 4, 2))
    model = Fixed(z, jnp.full_like(z, -30.0), images())
    batch = {"image": jnp.zeros((2, 8, 8, 3), jnp.uint8)}
    metrics = run(AutoencoderTask(model=CONFIG), model, batch, monkeypatch)
    model.config = dataclasses.replace(
        CONFIG, shift_factor=metrics["z_mean"], scaling_factor=1 / metrics["z_std"]
    )
    latents = model.to_latents(z)
    np.testing.assert_allclose([latents.mean(), latents.std()], [0, 1], atol=1e-4)


def test_psnr_counts_from_the_whole_range_and_stays_finite():
    x = jnp.zeros((2, 4, 4, 3))
    # An error of a tenth of the range is 20 dB; what leaves the range is cut off first.
    np.testing.assert_allclose(psnr(x + 0.2, x), 20, rtol=1e-5)
    np.testing.assert_allclose(psnr(x + 5, x + 0.8), 20, rtol=1e-5)
    assert 100 < psnr(x, x) < 110


@functools.cache
def distances() -> dict[str, jax.Array]:
    """Of images from themselves, from slightly and from much changed ones, and from larger ones."""

    @jax.jit
    def all_of_them(params, x):
        encoder = bind_params(PERCEPTUAL_TASK.frozen_parts()["vision",].build, params)
        noise = jax.random.normal(jax.random.key(2), x.shape)
        larger = x.repeat(3, axis=1).repeat(3, axis=2)
        others = {"itself": x, "near": x + 0.1 * noise, "far": x + noise, "larger": larger}
        return {name: PERCEPTUAL.distance(encoder, x, other) for name, other in others.items()}

    return all_of_them(vision_params(), images())


def test_the_perceptual_distance_is_zero_from_itself_and_grows_with_change():
    found = distances()
    assert found["itself"] == 0
    assert 0 < found["near"] < found["far"] < 4


def test_the_perceptual_distance_does_not_depend_on_the_size():
    assert distances()["larger"] < distances()["far"]


def test_the_vision_encoder_of_a_clip_is_frozen_where_it_is_used():
    assert AutoencoderTask(model=CONFIG).frozen_parts() == {}
    ((path, part),) = PERCEPTUAL_TASK.frozen_parts().items()
    assert (path, part.folder) == (("vision",), "runs/clip")


def test_a_few_steps_lower_every_weighted_term():
    history, _ = on_one_device()
    first, last = history[0], history[-1]
    for name in ("loss", "reconstruction", "perceptual"):
        assert last[name] < 0.8 * first[name], name
    assert last["psnr"] > first["psnr"] + 2


def test_the_loss_is_the_weighted_sum_of_its_terms():
    metrics = on_one_device()[0][0]
    expected = metrics["reconstruction"] + 1e-6 * metrics["kl"] + 0.5 * metrics["perceptual"]
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_perceptual_term_trains_encoder_and_decoder_and_not_the_vision_encoder():
    task, (_, state) = PERCEPTUAL_TASK, train_step()

    @jax.jit
    def gradient(params, frozen, batch):
        def perceptual(params):
            keys = RowKeys.whole(jax.random.key(0), len(batch["image"]))
            _, metrics, _ = task.loss(params, frozen, batch, keys, (), params)
            return metrics["perceptual"]

        return jax.grad(perceptual)(params)

    found = gradient(state.params, {"vision": vision_params()}, make_batch())
    assert set(found) == {"encoder", "decoder", "quant_conv", "post_quant_conv"}
    for part in ("encoder", "decoder"):
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found[part])) > 0


@pytest.mark.slow
def test_eight_devices_train_as_one_does():
    mesh = make_mesh(MeshConfig(data=8))
    step, state = train_step()
    batch = jax.device_put(make_batch(), batch_sharding(mesh))
    frozen = jax.device_put({"vision": vision_params()}, replicated(mesh))
    placed = state_shardings(jax.eval_shape(lambda: state), mesh, {})
    state = jax.device_put(state, placed)
    step = jax.jit(step, out_shardings=(placed, replicated(mesh)))
    for expected in on_one_device()[0][:3]:
        state, metrics = step(state, frozen, batch)
        for name in ("loss", "kl", "z_std", "psnr"):
            assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=1e-3), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoencoderTask(model=CONFIG, kl_weight=-1.0), "kl_weight is -1.0"),
        (lambda: AutoencoderTask(model=CONFIG, l2_fraction=2.0), "l2_fraction is 2.0"),
        (lambda: AutoencoderTask(model=CONFIG, latent_noise=-0.1), "latent_noise is -0.1"),
        (lambda: AutoencoderTask(model=CONFIG, decoder_only=True), "without task.pretrained"),
        (lambda: Perceptual(model=VISION, pretrained="x", weight=0.0), "weight is 0.0"),
        (lambda: AutoencoderTask(model=AutoencoderConfig(image_channels=1)), "1 channels"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_training_starts_from_a_trained_autoencoder(tmp_path):
    trained = AutoencoderTask(model=CONFIG)
    params = jax.jit(lambda: trained.init_params(nnx.Rngs(7)))()
    write_bundle(tmp_path, Bundle(CONFIG, params, {}), dtype="float32")
    task = AutoencoderTask(model=CONFIG, pretrained=str(tmp_path))
    state = init_state(task, OPTIMIZER, Ema(), 0, load_parts(task.initial_parts()))
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    wider = dataclasses.replace(task, model=dataclasses.replace(CONFIG, latent_channels=3))
    with pytest.raises(UserError, match="shape"):
        load_parts(wider.initial_parts())


def test_noise_of_latents_has_a_half_normal_deviation_for_each_image():
    """Equal in a batch and in its parts: it depends on the row."""
    task = AutoencoderTask(model=dataclasses.replace(CONFIG, scaling_factor=0.5), latent_noise=0.3)
    keys = RowKeys.whole(jax.random.key(0), 2000)
    noise = np.asarray(task._noisy(jnp.zeros((2000, 8, 8, 4)), keys))
    deviations = noise.reshape(2000, -1).std(1)
    assert np.mean(deviations) == pytest.approx(0.6 * np.sqrt(2 / np.pi), rel=0.05)
    assert np.mean(deviations**2) == pytest.approx(0.6**2, rel=0.08)
    part = dataclasses.replace(keys, rows=keys.rows[500:600])
    np.testing.assert_array_equal(task._noisy(jnp.zeros((100, 8, 8, 4)), part), noise[500:600])


@pytest.mark.slow
def test_a_decoder_is_trained_alone_and_read_with_its_encoder(tmp_path):
    config = load_recipe(ROOT / "configs" / "produce_autoencoder.py")
    params = jax.jit(lambda: AutoencoderTask(model=CONFIG).init_params(nnx.Rngs(7)))()
    write_bundle(tmp_path / "whole", Bundle(CONFIG, params, {}), dtype="float32")
    task = AutoencoderTask(
        model=CONFIG, pretrained=str(tmp_path / "whole"), decoder_only=True, latent_noise=0.3
    )
    assert {path[0] for path in task.frozen_parts()} == {"encoder", "quant_conv"}
    assert {path[0] for path in task.initial_parts()} == {"decoder", "post_quant_conv"}
    config = dataclasses.replace(
        config,
        task=task,
        data=dataclasses.replace(config.data, transforms=Transforms(size=16, caption_dropout=0.0)),
        train=dataclasses.replace(config.train, steps=2, batch_size=8, checkpoint_every=2),
        ema=Ema(decay=0.5),
        evaluators=(Reconstructions(count=4),),
    )
    run_recipe(config, str(tmp_path / "run"), log=lambda _: None)
    assert (tmp_path / "run" / "samples" / "step_000002.png").exists()
    read = load_bundle(tmp_path / "run").params
    assert jax.tree.structure(read) == jax.tree.structure(params)
    equal = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), read, params)
    assert all(jax.tree.leaves([equal["encoder"], equal["quant_conv"]]))
    assert not any(jax.tree.leaves([equal["decoder"], equal["post_quant_conv"]]))
