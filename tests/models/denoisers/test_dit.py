"""The DiT: what its output depends on, and what it does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.dit import DiT, DiTBlock, DiTConfig
from jaxdiff.models.layers import any_rngs, bind_params, scan_blocks, stack_blocks

BATCH, TOKENS, WIDTH = 2, 5, 32
MODES = ("cross", "joint")


def make_config(**changes) -> DiTConfig:
    sizes = {"patch_size": 4, "width": WIDTH, "depth": 2, "heads": 2}
    return DiTConfig(**sizes, text_width=8, pooled_width=12, **changes)


def random_like(tree, seed: int):
    """Weights away from their initial zeros, which would hide what lies behind them."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(0.2 * rng.normal(size=p.shape), p.dtype), tree)


@functools.cache
def weights(config: DiTConfig):
    model = nnx.eval_shape(lambda: DiT(config, rngs=any_rngs()))
    return random_like(nnx.to_pure_dict(nnx.split(model)[1]), seed=1)


@functools.cache
def apply(config: DiTConfig):
    """(params, x, t, text) -> output, compiled once per shape."""

    def call(params, x, t, text):
        return bind_params(lambda: DiT(config, rngs=any_rngs()), params)(x, t, text)

    return jax.jit(call)


def make_inputs(height: int = 8, width: int = 8, channels: int = 3):
    """x, t and text; of five tokens, three count in the first prompt and four in the second."""
    rng = np.random.default_rng(2)
    text = Conditioning(
        tokens=jnp.asarray(rng.normal(size=(BATCH, TOKENS, 8)), jnp.float32),
        pooled=jnp.asarray(rng.normal(size=(BATCH, 12)), jnp.float32),
        mask=jnp.arange(TOKENS) < jnp.array([[3], [4]]),
    )
    x = jnp.asarray(rng.normal(size=(BATCH, height, width, channels)), jnp.float32)
    return x, jnp.array([0.3, 0.8]), text


@pytest.mark.parametrize("config", [make_config(), make_config(bottleneck=6, channels=4)])
def test_the_output_has_the_shape_of_the_input_at_any_size(config):
    for height, width in ((8, 8), (16, 12)):
        inputs = make_inputs(height, width, config.channels)
        shape = jax.eval_shape(apply(config), weights(config), *inputs)
        assert (shape.shape, shape.dtype) == (inputs[0].shape, jnp.float32)


def test_an_image_that_the_patches_do_not_tile_is_refused():
    with pytest.raises(UserError, match="multiple of 4"):
        jax.eval_shape(apply(make_config()), weights(make_config()), *make_inputs(8, 10))


def test_heads_that_do_not_split_the_width_are_refused():
    with pytest.raises(UserError, match="multiple of 4 x heads"):
        DiTConfig(width=36, heads=2)


@functools.cache
def token_gradients(text: str):
    """|d output / d token|, [b, n], and the output."""
    config = make_config(text=text)
    x, t, features = make_inputs()

    @jax.jit
    def run(params, tokens):
        def energy(tokens):
            y = apply(config)(params, x, t, features._replace(tokens=tokens))
            return jnp.sum(y**2), y

        return jax.grad(energy, has_aux=True)(tokens)

    gradient, output = run(weights(config), features.tokens)
    return np.abs(gradient).max(axis=-1), np.asarray(output)


@pytest.mark.parametrize("text", MODES)
def test_the_output_depends_on_every_token_under_the_mask_and_on_no_other(text):
    gradient, _ = token_gradients(text)
    mask = np.asarray(make_inputs()[2].mask)
    assert gradient[mask].min() > 1e-6
    assert np.all(gradient[~mask] == 0)


@pytest.mark.parametrize("text", MODES)
def test_masked_tokens_and_the_order_of_tokens_change_nothing(text):
    """The encoder has encoded the order of the text: the denoiser adds no positions to it."""
    x, t, features = make_inputs()
    order = jnp.array([3, 2, 0, 4, 1])
    tokens = jnp.where(features.mask[..., None], features.tokens, 100.0)
    changed = features._replace(tokens=tokens[:, order], mask=features.mask[:, order])
    config = make_config(text=text)
    y = apply(config)(weights(config), x, t, changed)
    np.testing.assert_allclose(y, token_gradients(text)[1], rtol=1e-4, atol=1e-4)


def test_time_pooled_text_and_place_all_count():
    config = make_config()
    x, t, text = make_inputs()
    run = functools.partial(apply(config), weights(config))
    y = run(x, t, text)

    def differs(other) -> bool:
        return bool(jnp.abs(other - y).max() > 1e-2)

    assert differs(run(x, t + 0.1, text))
    assert differs(run(x, t, text._replace(pooled=-text.pooled)))
    # Were patches a set, swapping the left ones for the right ones would swap the output.
    assert differs(jnp.roll(run(jnp.roll(x, 4, axis=2), t, text), 4, axis=2))


def test_an_image_does_not_depend_on_the_others_in_the_batch():
    config = make_config()
    x, t, text = make_inputs()
    run = functools.partial(apply(config), weights(config))
    y = run(x, t, text)
    other = run(x.at[1].add(1.0), t.at[1].set(0.1), text._replace(pooled=text.pooled.at[1].add(1)))
    np.testing.assert_array_equal(other[0], y[0])


@pytest.mark.parametrize("text", MODES)
def test_a_fresh_model_predicts_zero(text):
    """The last layer starts at zero, and so does each block's gate (adaLN-zero)."""
    config = make_config(text=text)
    fresh = jax.jit(lambda: nnx.to_pure_dict(nnx.split(DiT(config, rngs=nnx.Rngs(0)))[1]))()
    y = apply(config)(fresh, *make_inputs())
    assert np.all(np.asarray(y) == 0)
    assert np.all(np.asarray(fresh["blocks"]["modulation"]["kernel"]) == 0)


def test_every_way_to_save_memory_gives_the_same_gradient():
    inputs = make_inputs()

    def gradient(remat):
        config = make_config(remat=remat)

        def energy(params):
            return jnp.mean(apply(config)(params, *inputs) ** 2)

        return jax.jit(jax.grad(energy))(weights(make_config()))

    kept = gradient("none")
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(kept)) > 0
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
            gradient(remat),
            kept,
        )


def test_scanned_blocks_are_the_blocks_one_after_the_other():
    config = make_config()
    _, _, text = make_inputs()
    blocks = nnx.eval_shape(
        lambda: stack_blocks(lambda rngs: DiTBlock(config, rngs=rngs), config.depth, any_rngs())
    )
    graphdef, abstract = nnx.split(blocks)
    params = random_like(abstract, seed=3)
    rng = np.random.default_rng(4)
    x, cond = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 4, WIDTH), (2, WIDTH)))

    def call(block, h):
        return block(h, cond, text.tokens, text.mask, jnp.ones((4, WIDTH // 4)), None)

    @jax.jit
    def scanned(params):
        return scan_blocks(nnx.merge(graphdef, params), x, call, all_states=True)

    @jax.jit
    def one(block, h):
        return call(nnx.merge(graphdef, block), h)

    last, states = scanned(params)
    h = x
    for i in range(config.depth):
        h = one(jax.tree.map(lambda p, i=i: p[i], params), h)
        np.testing.assert_allclose(states[i], h, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(last, states[-1])


def products(jaxpr):
    """Types of both sides of every matrix product in a program, inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(v.aval.dtype.name for v in equation.invars)
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize("text", MODES)
def test_weights_in_bfloat16_mean_products_in_bfloat16_and_an_output_in_float32(text):
    config = make_config(text=text)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), weights(config))
    inputs = make_inputs()
    program = jax.make_jaxpr(apply(config))(half, *inputs)
    found = list(products(program.jaxpr))
    assert len(found) > 10
    assert set(found) == {("bfloat16", "bfloat16")}
    y = apply(config)(half, *inputs)
    exact = apply(config)(weights(config), *inputs)
    assert y.dtype == jnp.float32
    error = jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)
    assert 0 < error < 0.1
