"""Feature caching against diffusers' hooks, on the same network along the same path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
hooks = pytest.importorskip("diffusers.hooks")

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.hooks import CacheContext, _set_cache_context

from benchmarks.torch_dit import Block, TorchDiT, to_torch_names
from jaxdiff.benchmark.synthetic import random_like
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.dit import DiTConfig
from jaxdiff.models.layers import abstract_params, bind_build, bind_params
from jaxdiff.sampling.feature_cache import (
    FirstBlockCache,
    TaylorSeer,
    evaluate_cached,
    init_cache,
)

pytestmark = pytest.mark.parity
CONFIG = DiTConfig(
    channels=4, patch_size=2, width=32, depth=3, heads=2, text_width=24, pooled_width=16
)
STEPS = 14


@pytest.fixture(scope="module")
def path():
    """Parameters, times, x at each, and the text: one image on its way from noise."""
    build = bind_build(CONFIG)
    params = jax.tree.map(lambda x: 8 * x, random_like(abstract_params(build)))
    rng = np.random.default_rng(0)
    shapes = (1, 8, 12, 4), (1, 8, 12, 4), (1, 7, 24), (1, 16)
    x0, noise, tokens, pooled = (rng.standard_normal(s, np.float32) for s in shapes)
    times = np.linspace(1, 0.35, STEPS, dtype=np.float32)
    mask = np.ones((1, 7), bool)
    return params, times, [(1 - t) * x0 + t * noise for t in times], (tokens, mask, pooled)


def ours(cache, path):
    params, times, xs, text = path
    cond, build = Conditioning(*map(jnp.asarray, text)), bind_build(CONFIG)

    @jax.jit
    def step(params, x, t, state):
        network = bind_params(build, params)
        return evaluate_cached(cache, network, x, t, cond, state, 1)

    network = bind_params(build, params)
    state = init_cache(cache, network, jnp.asarray(xs[0]), jnp.ones(1), cond)
    made, evaluations = [], []
    for x, t in zip(xs, times, strict=True):
        out, state = step(params, jnp.asarray(x), jnp.float32(t), state)
        made.append(np.asarray(out))
        evaluations.append(int(state.evaluations[0]))
    return np.stack(made), evaluations


def theirs(model, path):
    _, times, xs, (tokens, mask, pooled) = path
    _set_cache_context(model, CacheContext(name="cond"))
    text = [torch.from_numpy(a) for a in (tokens, pooled, mask)]
    with torch.no_grad():
        made = [
            model(torch.from_numpy(x), torch.tensor([t]), *text).numpy()
            for x, t in zip(xs, times, strict=True)
        ]
    return np.stack(made)


def torch_model(path):
    model = TorchDiT(CONFIG)
    model.load_state_dict(to_torch_names(path[0]))
    return model


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_first_block_cache(path, threshold):
    metadata = TransformerBlockMetadata()
    metadata._cached_parameter_indices = {"hidden_states": 0}
    TransformerBlockRegistry.register(model_class=Block, metadata=metadata)
    model, exact = torch_model(path), theirs(torch_model(path), path)
    hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig(threshold=threshold))
    expected = theirs(model, path)
    found, evaluations = ours(FirstBlockCache(threshold=threshold), path)
    assert 1 < evaluations[-1] < STEPS
    assert np.abs(expected - exact).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4)


class Tail(torch.nn.Module):
    """All blocks but the first; `rest` is what they add, which the hook predicts."""

    class Rest(torch.nn.Module):
        def __init__(self, blocks):
            super().__init__()
            self.blocks = torch.nn.ModuleList(blocks)

        def forward(self, x, *inputs):
            before = x
            for block in self.blocks:
                x = block(x, *inputs)
            return x - before

    def __init__(self, blocks):
        super().__init__()
        self.rest = self.Rest(blocks)

    def forward(self, x, *inputs):
        return x + self.rest(x, *inputs)


@pytest.mark.parametrize(
    ("interval", "warmup", "order"), [(3, 3, 1), (2, 1, 0), (4, 2, 2), (5, 3, 1)]
)
def test_taylorseer(path, interval, warmup, order):
    model, exact = torch_model(path), theirs(torch_model(path), path)
    first, *others = model.blocks
    model.blocks = torch.nn.ModuleList([first, Tail(others)])
    config = hooks.TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=warmup,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\.1\.rest"],
    )
    cache = TaylorSeer(interval=interval, warmup=warmup, order=order)
    hooks.apply_taylorseer_cache(model, config)
    expected = theirs(model, path)
    found, evaluations = ours(cache, path)
    assert 1 < evaluations[-1] < STEPS
    assert np.abs(expected - exact).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4)
