"""Adapters in a network: where they go, what they compute, and that they start as nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.errors import UserError
from jaxdiff.models import lora
from jaxdiff.models.convolutions import Conv
from jaxdiff.models.layers import Dense, scan_blocks, stack_blocks
from jaxdiff.models.lora import LoraConfig

DEPTH = 3


class Network(nnx.Module):
    def __init__(self, rngs):
        self.conv = Conv(2, 4, 3, 2, rngs)
        self.blocks = stack_blocks(lambda rngs: Dense(4, 4, rngs=rngs), DEPTH, rngs)
        self.heads = nnx.List(Dense(4, 3, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        x = self.conv(x).reshape(2, 9, 4)
        x, _ = scan_blocks(self.blocks, x, lambda block, x: jnp.tanh(block(x)))
        return sum(head(x) for head in self.heads)


CONFIG = LoraConfig(rank=2, alpha=3.0, targets=("conv", "blocks", "heads.1"))


def network(config=None):
    module = Network(nnx.Rngs(0))
    if config is not None:
        lora.attach(module, config, nnx.Rngs(1))
    return module


def params_of(module):
    return nnx.to_pure_dict(nnx.state(module))


def random(params):
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), params)


def call(params, x, config=None):
    graphdef = nnx.split(nnx.eval_shape(lambda: network(config)))[0]
    return nnx.merge(graphdef, params)(x)


X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 6, 2)), jnp.float32)


def test_nothing_changes_before_the_first_update():
    plain = network()
    adapters = params_of(lora.Adapters(network(CONFIG)))
    assert {str(path[0]) for path in lora.factors(adapters)} == {"conv", "blocks", "heads"}
    ours = call(lora.adapted(params_of(plain), adapters), X, CONFIG)
    np.testing.assert_array_equal(ours, plain(X))


def test_beside_the_weights_is_as_within_them():
    params, adapters = (
        random(params_of(network())),
        random(params_of(lora.Adapters(network(CONFIG)))),
    )
    apart = call(lora.adapted(params, adapters), X, CONFIG)
    pairs = {
        path: pair._replace(up=pair.up * CONFIG.scale)
        for path, pair in lora.factors(adapters).items()
    }
    within = call(lora.merged(params, pairs), X)
    np.testing.assert_allclose(apart, within, rtol=1e-4, atol=1e-4)
    assert np.abs(apart - call(params, X)).max() > 0.1


def test_they_come_off_again():
    params = random(params_of(network()))
    adapters = random(params_of(lora.Adapters(network(CONFIG))))
    both = lora.adapted(params, adapters)
    jax.tree.map(np.testing.assert_array_equal, lora.without(both), params)
    jax.tree.map(np.testing.assert_array_equal, lora.tree(lora.factors(both)), adapters)


def test_two_of_one_layer_add_up():
    draw = np.random.default_rng(0)
    one, two = (
        lora.Factors(draw.normal(size=(5, rank)), draw.normal(size=(rank, 4))) for rank in (2, 3)
    )
    both = one.beside(two)
    assert both.down.shape == (5, 5)
    np.testing.assert_allclose(both.product, one.product + two.product, rtol=1e-5)


@pytest.mark.parametrize(
    ("target", "path", "adapts"),
    [
        ("q", "blocks.attention.q", True),
        ("q", "blocks.seq", False),
        ("attention.q", "blocks.cross.q", False),
        ("up.*.conv1", "up.11.conv1", True),
        ("up.*.conv1", "up.x.conv1", False),
        ("down.0.q", "down.0.q", True),
    ],
)
def test_targets_are_ends_of_paths_in_whole_names(target, path, adapts):
    assert LoraConfig(targets=(target,)).adapts(path) == adapts


def test_targets_that_are_no_layers_are_told():
    with pytest.raises(UserError, match="no layer's path ends in any of nose"):
        network(LoraConfig(targets=("nose",)))


def test_a_rank_of_nothing_is_told():
    with pytest.raises(UserError, match="rank is 0"):
        LoraConfig(rank=0)
