"""Adapters in a network: where they go, what they compute, and that they start without effect."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.errors import UserError
from jaxdiff.models import lora
from jaxdiff.models.convolutions import Conv
from jaxdiff.models.layers import Dense, bind_params, scan_blocks, stack_blocks
from jaxdiff.models.lora import LoraConfig, LoraPattern

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


def network():
    return Network(nnx.Rngs(0))


def adapters_of(config=CONFIG):
    return lora.init_adapters(network(), config, nnx.Rngs(1))


def params_of(module):
    return nnx.to_pure_dict(nnx.state(module))


def random(params):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)


def call(params, x, adapters=None):
    module = bind_params(network, params)
    if adapters is not None:
        lora.add_adapters(module, adapters)
    return module(x)


X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 6, 2)), jnp.float32)


def test_adapters_change_nothing_before_the_first_update():
    adapters = adapters_of()
    assert {str(path[0]) for path in lora.factors(adapters)} == {"conv", "blocks", "heads"}
    params = params_of(network())
    np.testing.assert_array_equal(call(params, X, adapters), call(params, X))


def test_adapters_mirror_the_networks_parameters():
    adapters, params = adapters_of(), params_of(network())
    for path, pair in lora.factors(adapters).items():
        node = params
        for name in path:
            node = node[name]
        *_, inputs, outputs = node["kernel"].shape
        assert (pair.down.shape[-2], pair.up.shape[-1]) == (inputs, outputs)
        assert pair.down.shape[-1] == pair.up.shape[-2] == CONFIG.rank
    assert adapters["blocks"]["lora"]["down"].shape == (DEPTH, 4, 2)
    assert adapters["conv"]["lora"]["down"].shape == (3, 3, 2, 2)
    assert adapters["conv"]["lora"]["up"].shape == (1, 1, 2, 4)


def test_added_adapters_equal_merged_ones():
    params, adapters = random(params_of(network())), random(adapters_of())
    adapters = lora.scale_adapters(adapters, CONFIG)
    added = call(params, X, adapters)
    merged = call(lora.merge_adapters(params, lora.factors(adapters)), X)
    np.testing.assert_allclose(added, merged, rtol=1e-4, atol=1e-4)
    assert np.abs(added - call(params, X)).max() > 0.1


def test_the_scale_multiplies_the_effect():
    adapters = random(adapters_of())
    halved = lora.scale_adapters(adapters, LoraConfig(rank=4, alpha=2.0))
    for path, pair in lora.factors(adapters).items():
        half = lora.factors(halved)[path]
        np.testing.assert_array_equal(half.down, pair.down)
        np.testing.assert_array_equal(half.up, pair.up / 2)
    same = lora.scale_adapters(adapters, LoraConfig(rank=4))
    jax.tree.map(np.testing.assert_array_equal, same, adapters)


def test_layers_may_have_a_rank_and_an_alpha_of_their_own():
    patterns = (
        LoraPattern(targets=("heads.*",), rank=3, alpha=1.5),
        LoraPattern(targets=("heads.1", "conv"), rank=5),
    )
    config = dataclasses.replace(CONFIG, patterns=patterns)
    pairs = lora.factors(adapters_of(config))
    ranks = {path[0]: pair.down.shape[-1] for path, pair in pairs.items()}
    assert ranks == {"conv": 5, "blocks": CONFIG.rank, "heads": 3}
    scales = {path: config.scale_of(path) for path in ("conv", "blocks", "heads.1")}
    assert scales == {"conv": 1, "blocks": 1.5, "heads.1": 0.5}
    scaled = lora.factors(lora.scale_adapters(lora.tree(pairs), config))
    for path, pair in pairs.items():
        factor = scales[".".join(map(str, path))]
        np.testing.assert_array_equal(scaled[path].up, factor * pair.up)


def test_a_shared_network_has_no_adapters_left_over():
    """Networks of one graph are merged again for each call."""
    params, adapters = random(params_of(network())), random(adapters_of())
    before = call(params, X)
    call(params, X, adapters)
    np.testing.assert_array_equal(call(params, X), before)


def test_factors_and_tree_are_inverse():
    adapters = random(adapters_of())
    again = lora.tree(lora.factors(adapters))
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


def test_two_adapters_of_one_layer_add_up():
    rng = np.random.default_rng(0)
    one, two = (
        lora.Factors(rng.normal(size=(5, rank)), rng.normal(size=(rank, 4))) for rank in (2, 3)
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


def test_targets_that_match_no_layer_are_refused():
    with pytest.raises(UserError, match="no layer's path ends in nose"):
        adapters_of(LoraConfig(targets=("nose",)))


def test_a_rank_of_zero_is_refused():
    with pytest.raises(UserError, match="rank is 0"):
        LoraConfig(rank=0)
