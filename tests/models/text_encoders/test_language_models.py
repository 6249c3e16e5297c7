"""Encoders of language models whose weights are sharded give the same tokens as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.distributed.mesh import MeshConfig, batch_sharding, make_mesh
from jaxdiff.distributed.sharding import state_shardings
from jaxdiff.models.layers import abstract_params, bind_build, bind_params, param_axes
from jaxdiff.models.text_encoders.qwen3 import Qwen3Config, Qwen3TextEncoder
from jaxdiff.models.text_encoders.t5 import T5Config, T5TextEncoder

MESHES = [MeshConfig(data=1, fsdp=8), MeshConfig(fsdp=2, tensor=4)]
N = 16
SIZE = {"vocab_size": 128, "width": 64, "depth": 2, "heads": 4, "head_dim": 32, "mlp_width": 128}
ENCODERS = {
    "qwen3": Qwen3TextEncoder(
        model=Qwen3Config(kv_heads=2, **SIZE), hidden_layers=(1, 2), max_length=N
    ),
    "one head of keys": Qwen3TextEncoder(
        model=Qwen3Config(kv_heads=1, **SIZE), hidden_layers=(1,), max_length=N
    ),
    "t5": T5TextEncoder(model=T5Config(**SIZE), max_length=N),
}
IDS = np.random.default_rng(0).integers(0, 128, (8, N))
MASK = np.arange(N) < np.arange(9, 17)[:, None]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_sharded_weights_give_the_same_tokens(name, mesh):
    encoder, rng = ENCODERS[name], np.random.default_rng(1)
    build = bind_build(encoder)
    shapes = abstract_params(build)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)

    def run(params, ids, mask):
        return bind_params(build, params)(ids, mask)

    devices = make_mesh(mesh)
    shardings = state_shardings(shapes, devices, param_axes(build))
    split = {axis for s in jax.tree.leaves(shardings) for axis in s.spec if axis is not None}
    assert split == {axis for axis in ("fsdp", "tensor") if devices.shape[axis] > 1}

    @jax.jit
    def sharded(params, ids, mask):
        with jax.sharding.use_abstract_mesh(devices.abstract_mesh):
            return run(params, ids, mask)

    placed = jax.device_put((IDS, MASK), batch_sharding(devices))
    found = sharded(jax.device_put(params, shardings), *placed)
    expected = jax.jit(run)(params, jnp.asarray(IDS), jnp.asarray(MASK))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), found, expected)
