"""Pipelines whose kernels are stored in 8 bits."""

import jax
import numpy as np
import pytest

from jaxdiff.models.lora import Adapters, Factors
from jaxdiff.models.quantized import QuantizedKernel
from jaxdiff.pipelines import load as load_module
from jaxdiff.pipelines.load import load
from jaxdiff.pipelines.lora import attach, merge
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pretrained.bundle import write_bundle
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.pretrained.lora import write_lora
from tests.pretrained.families import random_bundle

PEA = ["a small red pea"]


@pytest.fixture(scope="module")
def quantized(tiny_bundle) -> Pipeline:
    return Pipeline(tiny_bundle, quantize="int8")


def test_it_samples_what_its_rounded_kernels_do(quantized, pipeline):
    def rounded(leaf):
        return np.asarray(leaf[...]) if isinstance(leaf, QuantizedKernel) else leaf

    is_kernel = lambda x: isinstance(x, QuantizedKernel)  # noqa: E731
    params = jax.tree.map(rounded, quantized.params, is_leaf=is_kernel)
    expected = pipeline.with_bundle(pipeline.bundle._replace(params=params))
    images = [pipe(PEA, seeds=1, output="float") for pipe in (quantized, expected, pipeline)]
    np.testing.assert_allclose(images[0], images[1], atol=1e-5)
    assert np.abs(images[0] - images[2]).max() > 1e-3
    assert quantized.fingerprint not in (pipeline.fingerprint, expected.fingerprint)


def test_a_loaded_model_is_the_same(quantized, tiny_bundle, tmp_path):
    write_bundle(tmp_path, tiny_bundle, dtype="float32")
    assert load(str(tmp_path), quantize="int8").fingerprint == quantized.fingerprint


def test_adapters_are_merged_before_each_kernel_is_rounded(tmp_path, monkeypatch):
    bundle = random_bundle("FLUX.1 schnell", tmp_path)
    write_bundle(tmp_path / "model", bundle, "float32")
    rng = np.random.default_rng(0)
    pair = Factors(*(rng.normal(0, 0.1, x).astype(np.float32) for x in ((1, 32, 2), (1, 2, 32))))
    adapters: Adapters = {"denoiser": {("double", "image", "q"): pair}}
    write_lora(tmp_path / "a.safetensors", adapters, bundle.spec)
    files = [(tmp_path / "a.safetensors", 0.5), (tmp_path / "a.safetensors", 1.5)]
    read = []

    def record(*arguments, **options):
        read.append(load_bundle(*arguments, **options))
        return read[-1]

    monkeypatch.setattr(load_module, "load_bundle", record)
    for kind in ("int8", None):
        found = load(str(tmp_path / "model"), quantize=kind, lora=files)
        twice = merge(bundle, {"denoiser": {("double", "image", "q"): pair.scaled(2.0)}})
        expected = Pipeline(twice, quantize=kind).params["denoiser"]
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1 if x.dtype == np.int8 else 1e-5),
            found.params["denoiser"],
            expected,
        )
    kernels = [read[0].params["denoiser"]["double"]["image"][name]["kernel"] for name in "qkv"]
    assert all(isinstance(kernel, QuantizedKernel) for kernel in kernels)


def test_adapters_apply_beside_and_merged(quantized):
    kernel = quantized.params["denoiser"]["blocks"]["attention"]["q"]["kernel"]
    rng = np.random.default_rng(0)
    down, up = (rng.normal(0, 0.3, s).astype(np.float32) for s in ((2, 32, 2), (2, 2, 32)))
    adapters = {"denoiser": {("blocks", "attention", "q"): Factors(down, up)}}
    beside = quantized.with_bundle(attach(quantized.bundle, adapters))
    merged = quantized.with_bundle(merge(quantized.bundle, adapters))
    new = merged.params["denoiser"]["blocks"]["attention"]["q"]["kernel"]
    assert isinstance(new, QuantizedKernel)
    np.testing.assert_allclose(new[...], kernel[...] + down @ up, atol=0.02)
    images = [pipe(PEA, seeds=1, output="float") for pipe in (beside, merged, quantized)]
    assert np.abs(images[0] - images[1]).mean() < 0.3 * np.abs(images[0] - images[2]).mean()
