"""Loading to the devices that hold each parameter, and models that do not fit."""

import jax
import numpy as np
import pytest

from jaxdiff.distributed.chips import GIB
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.distributed.replicas import local_mesh
from jaxdiff.errors import UserError
from jaxdiff.pipelines.load import check_memory, load
from jaxdiff.pretrained.bundle import write_bundle


def test_parameters_are_read_to_their_shards(tiny_bundle, tmp_path):
    write_bundle(tmp_path, tiny_bundle, "float32")
    pipe = load(tmp_path, devices=jax.devices()[:4], mesh=MeshConfig(fsdp=4), dtype="bfloat16")
    leaves = jax.tree.leaves(pipe.params)
    assert any(leaf.addressable_shards[0].data.size == leaf.size // 4 for leaf in leaves)
    assert {str(leaf.dtype) for leaf in leaves if leaf.ndim} == {"bfloat16"}
    offloaded = load(tmp_path, devices=jax.devices()[:1], offload_text=True)
    assert all(
        isinstance(x, np.ndarray) for x in jax.tree.leaves(offloaded.params["text_encoders"])
    )
    for read, own in zip(
        jax.tree.leaves(offloaded.params), jax.tree.leaves(tiny_bundle.params), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(read), np.asarray(own))


def test_a_model_that_does_not_fit_names_the_mesh_that_would_do(tiny_bundle):
    spec, mesh = tiny_bundle.spec, local_mesh(jax.devices()[:8])
    size = sum(leaf.size for leaf in jax.tree.leaves(spec.abstract_params()))
    check_memory(spec, mesh, 2, limit=2 * size)
    with pytest.raises(UserError, match=r"set mesh.fsdp to 2, or quantize int8 or offload_text"):
        check_memory(spec, mesh, 2, limit=1.9 * size)
    with pytest.raises(UserError, match=r"use more than 8 devices"):
        check_memory(spec, mesh, 2, limit=0.05 * size)
    check_memory(spec, local_mesh(jax.devices()[:8], MeshConfig(fsdp=8)), 2, limit=1.9 * size)
    with pytest.raises(UserError, match=f"{(2 * size - GIB * 1e-9) / GIB:.1f} GiB more"):
        check_memory(spec, mesh, 2, limit=GIB * 1e-9)
    text = sum(x.size for x in jax.tree.leaves(spec.abstract_params()["text_encoders"]))
    check_memory(spec, mesh, 2, limit=2 * max(text, size - text), offload_text=True)
