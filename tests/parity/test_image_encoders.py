"""Inception-v3 and DINOv2 with the same weights as PyTorch, and distances of the same features."""

import dataclasses
import importlib
import sys
from importlib.util import find_spec
from unittest.mock import MagicMock

import jax
import numpy as np
import pytest
import transformers
from PIL import Image

from jaxdiff.evaluation import distances
from jaxdiff.evaluation.distances import moments_of
from jaxdiff.evaluation.features import clip_network
from jaxdiff.evaluation.resizing import pytorch_bilinear, tensorflow_bilinear
from jaxdiff.evaluation.self_test import (
    STORED,
    feature_values,
    fixed_images,
    fixed_inception,
)
from jaxdiff.models.image_encoders.dinov2 import cubic_weights
from jaxdiff.models.image_encoders.inception import InceptionV3
from jaxdiff.models.layers import abstract_params, bind_build, bind_init, bind_params
from jaxdiff.models.text_encoders.clip import (
    CLIP_MEAN,
    CLIP_STD,
    ClipConfig,
    ClipTextConfig,
    ClipVisionConfig,
)
from jaxdiff.pretrained import clip_keys
from jaxdiff.pretrained.dinov2_folder import read_dinov2_folder
from jaxdiff.pretrained.inception_file import inception_from_torch
from jaxdiff.pretrained.key_mapping import flatten_params

torch = pytest.importorskip("torch")

from tests.parity.torch_models import randomized, relative, tensors_of

pytestmark = pytest.mark.parity


def nchw(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@pytest.fixture(scope="module")
def torch_fidelity():
    """Imported without torchvision, which does not load beside a build of PyTorch for CPUs."""
    if find_spec("torch_fidelity") is None:
        pytest.skip("needs torch-fidelity: pip install --no-deps torch-fidelity==0.4.0")
    names = "torchvision", "torchvision.datasets", "torchvision.transforms.functional"
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, MagicMock())
        return importlib.import_module("torch_fidelity")


@pytest.fixture(scope="module")
def inception(torch_fidelity):
    """torch-fidelity's network, which would download its weights, with those of the self-test."""
    kind = torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: None)
        patch.setattr(kind, "load_state_dict", lambda *_: None)
        model = kind("inception", ["2048"], feature_extractor_weights_path="none")
    leaves = {
        "kernel": "conv.weight",
        "scale": "bn.weight",
        "bias": "bn.bias",
        "mean": "bn.running_mean",
        "variance": "bn.running_var",
    }
    state = model.state_dict()
    for (*modules, leaf), value in flatten_params(fixed_inception()).items():
        value = value.transpose(3, 2, 0, 1) if leaf == "kernel" else value
        state[".".join([*modules, leaves[leaf]])].copy_(torch.from_numpy(value.copy()))
    return model.eval()


@pytest.mark.optimized
def test_inception_and_the_stored_values_of_the_self_test(inception):
    images = fixed_images(3)
    with torch.no_grad():
        expected = inception(nchw(images))[0].numpy()
    params = inception_from_torch(tensors_of(inception))
    resized = np.stack([tensorflow_bilinear(image, 299) for image in images])
    build = bind_init(InceptionV3)
    assert set(flatten_params(params)) == set(flatten_params(abstract_params(build)))
    ours = jax.jit(lambda p, x: bind_params(build, p)(x))(params, (resized - 128) / 128)
    assert relative(ours, expected) < 1e-5
    for name, value in feature_values("inception", expected).items():
        assert value == pytest.approx(STORED[name], rel=1e-4)


@pytest.mark.parametrize("size", [(40, 56), (299, 299), (640, 512)])
def test_bilinear_resizing(torch_fidelity, size):
    fidelity = torch_fidelity.interpolate_compat_tensorflow
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    x = nchw(image[None]).float()
    tensorflow = fidelity.interpolate_bilinear_2d_like_tensorflow1x(
        x, size=(299, 299), align_corners=False
    )
    pytorch = torch.nn.functional.interpolate(
        x, size=(299, 299), mode="bilinear", align_corners=False
    )
    for ours, theirs in ((tensorflow_bilinear, tensorflow), (pytorch_bilinear, pytorch)):
        theirs = theirs[0].numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(ours(image, 299), theirs, atol=2e-3)


def test_distances_of_features(torch_fidelity):
    rng = np.random.default_rng(0)
    ours = rng.normal(size=(1200, 64)).astype(np.float32)
    theirs = (1.1 * rng.normal(size=(1100, 64)) + 0.1).astype(np.float32)
    x, y = map(torch.from_numpy, (ours, theirs))
    fid, kid, prc = (getattr(torch_fidelity, f"metric_{x}") for x in ("fid", "kid", "prc"))
    expected = fid.fid_statistics_to_metric(
        *(fid.fid_features_to_statistics(z.double()) for z in (x, y)), verbose=False
    )
    found = distances.frechet(moments_of(ours), moments_of(theirs))
    assert found == pytest.approx(expected[fid.KEY_METRIC_FID], rel=1e-6)
    expected = kid.kid_features_to_metric(x, y, verbose=False)[kid.KEY_METRIC_KID_MEAN]
    assert distances.kernel_distance(ours, theirs) == pytest.approx(expected, rel=1e-4)
    expected = prc.prc_features_to_metric(x, y, verbose=False)
    found = distances.precision_recall(ours, theirs)
    assert found == pytest.approx([expected["precision"], expected["recall"]], abs=2e-3)


def test_gaussian_mmd_of_unit_vectors():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 300, 16))
    x, y = (torch.nn.functional.normalize(torch.from_numpy(z)) for z in (ours, theirs + 0.1))
    means = [torch.exp(-(torch.cdist(a, b) ** 2) / 200).mean() for a, b in ((x, x), (y, y), (x, y))]
    expected = 1000 * float(means[0] + means[1] - 2 * means[2])
    assert distances.gaussian_mmd(ours, theirs + 0.1) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [56, 84])
def test_dinov2(size, tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=84,
        patch_size=14,
        mlp_ratio=2,
    )
    torch.manual_seed(0)
    model = randomized(transformers.Dinov2Model(config), 0.1)
    model.save_pretrained(tmp_path)
    spec, params = read_dinov2_folder(tmp_path)
    images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(nchw(images)).pooler_output
    build = bind_build(dataclasses.replace(spec, position_offset=0.0))
    ours = jax.jit(lambda p, x: bind_params(build, p)(x))(params, images)
    assert relative(ours, expected) < 1e-5


def test_positions_are_interpolated_as_in_the_authors_code():
    """Which scales by (16 + 0.1) / 37 and not by 16 / 37."""
    grid = np.random.default_rng(0).normal(size=(1, 4, 37, 37)).astype(np.float32)
    scale = ((16 + 0.1) / 37, (16 + 0.1) / 37)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(grid), scale_factor=scale, mode="bicubic"
    )
    weights = cubic_weights(37, 16, 0.1)
    ours = np.einsum("ir,jc,brcd->bijd", weights, weights, grid.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(ours, expected.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_cmmd_of_fixed_images_with_the_same_weights(tmp_path):
    """The images prepared as in the reference implementation: cut out, resized, normalised."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPVisionConfig(
        image_size=42, patch_size=14, intermediate_size=64, projection_dim=24, **sizes
    )
    torch.manual_seed(0)
    model = randomized(transformers.CLIPVisionModelWithProjection(config), 0.2)
    vision = ClipVisionConfig(
        image_size=42, patch_size=14, width=32, depth=2, heads=4, mlp_ratio=2, projection_dim=24
    )
    spec = ClipConfig(text=ClipTextConfig(projection_dim=24), vision=vision)
    network = clip_network(spec, clip_keys.clip_from_torch(tensors_of(model), vision), "tiny")
    rng = np.random.default_rng(0)
    sets = rng.integers(0, 256, (20, 50, 64, 3), np.uint8), fixed_images(24)
    ours = [network(list(images)) for images in sets]
    theirs = []
    for images in sets:
        top, left = ((side - min(images.shape[1:3])) // 2 for side in images.shape[1:3])
        side = min(images.shape[1:3])
        crops = [Image.fromarray(x[top : top + side, left : left + side]) for x in images]
        x = np.stack([np.asarray(crop.resize((42, 42), Image.BICUBIC)) for crop in crops]) / 255
        x = ((x - np.array(CLIP_MEAN)) / np.array(CLIP_STD)).astype(np.float32)
        with torch.no_grad():
            theirs.append(torch.nn.functional.normalize(model(nchw(x)).image_embeds.double()))
    x, y = theirs
    means = [torch.exp(-(torch.cdist(a, b) ** 2) / 200).mean() for a, b in ((x, x), (y, y), (x, y))]
    expected = 1000 * float(means[0] + means[1] - 2 * means[2])
    assert distances.gaussian_mmd(*ours) == pytest.approx(expected, rel=1e-4)
