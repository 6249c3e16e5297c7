"""A pipeline of a run, and of its exported model."""

import jax
import numpy as np
import pytest

from jaxdiff.pipelines.load import load
from jaxdiff.pretrained.bundle import write_bundle, write_tokenizers
from jaxdiff.training.abstract import abstract_state
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.workdir import write_config

pytestmark = pytest.mark.optimized  # compares bits of what users compile
PEA = "a small red pea"


def test_a_run_and_its_exported_bundle_sample_the_same(
    tiny_recipe, tiny_bundle, pipeline, tmp_path
):
    config, params = tiny_recipe(), tiny_bundle.params
    run, exported = tmp_path / "run", tmp_path / "exported"
    zeros = jax.tree.map(
        lambda leaf: (
            jax.numpy.zeros(leaf.shape, leaf.dtype)
            if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jax.random.key(0, impl="threefry2x32")
        ),
        abstract_state(config),
    )
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(zeros.replace(ema=jax.device_put(params)))
        checkpoints.wait()
    write_config(run, config)
    write_tokenizers(run, tiny_bundle.tokenizers)
    write_bundle(exported, tiny_bundle, dtype="float32")

    expected = pipeline([PEA], seeds=[1])
    for folder in (run, exported):
        loaded = load(str(folder))
        np.testing.assert_array_equal(loaded([PEA], seeds=[1]), expected)
        assert loaded.fingerprint == pipeline.fingerprint
