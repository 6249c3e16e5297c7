import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax
import jax.numpy as jnp

from benchmarks.torch_dit import TorchDiT, to_torch_names
from jaxdiff.benchmark.synthetic import random_like
from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.dit import DiT, DiTConfig
from jaxdiff.models.layers import abstract_params, any_rngs, bind_params

pytestmark = pytest.mark.parity
CONFIG = DiTConfig(
    channels=4, patch_size=2, width=32, depth=2, heads=2, text_width=24, pooled_width=16
)


def test_the_same_weights_give_the_same_prediction():
    def build() -> DiT:
        return DiT(CONFIG, rngs=any_rngs())

    params = jax.tree.map(lambda x: 8 * x, random_like(abstract_params(build)))
    rng = np.random.default_rng(0)
    x, tokens, pooled = (
        rng.standard_normal(shape, np.float32) for shape in ((2, 8, 12, 4), (2, 7, 24), (2, 16))
    )
    t, mask = np.array([0.2, 0.9], np.float32), np.arange(7) < np.array([[4], [7]])
    cond = Conditioning(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(pooled))
    ours = jax.jit(lambda p: bind_params(build, p)(jnp.asarray(x), jnp.asarray(t), cond))(params)
    model = TorchDiT(CONFIG)
    model.load_state_dict(to_torch_names(params))
    with torch.no_grad():
        theirs = model(*(torch.from_numpy(a) for a in (x, t, tokens, pooled, mask)))
    assert np.abs(np.asarray(ours)).max() > 0.1
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-3, atol=1e-4)


def test_unsupported_configs_are_refused():
    with pytest.raises(UserError, match="cross-attention and no bottleneck only"):
        TorchDiT(DiTConfig(text="joint"))
