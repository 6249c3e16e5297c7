"""Inception-v3 and DINOv2 with random weights of PyTorch give PyTorch's features."""

import jax
import numpy as np
import pytest

from jaxdiff.models.image_encoders.inception import InceptionV3
from jaxdiff.models.layers import bind_init, bind_params
from jaxdiff.pretrained.inception_file import inception_from_torch

torch = pytest.importorskip("torch")

from tests.parity.torch_models import relative, tensors_of

pytestmark = pytest.mark.parity

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), np.uint8)


def nchw(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    load, fidelity.torch.load = fidelity.torch.load, lambda *_, **__: None
    kind = fidelity.FeatureExtractorInceptionV3
    plain, kind.load_state_dict = kind.load_state_dict, lambda *_: None
    model = kind("inception", ["2048"], feature_extractor_weights_path="none")
    fidelity.torch.load, kind.load_state_dict = load, plain
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if name.endswith("running_var") or name.endswith("bn.weight"):
                x.uniform_(0.5, 1.5)
            elif name.endswith(("running_mean", "bn.bias")):
                x.normal_(0, 0.2)
            elif name.endswith("conv.weight"):
                x.normal_(0, (2 / x[0].numel()) ** 0.5)
    return model.eval()


def test_inception(inception):
    from jaxdiff.evaluation.resizing import tensorflow_bilinear

    with torch.no_grad():
        expected = inception(nchw(IMAGES))[0].numpy()
    params = inception_from_torch(tensors_of(inception))
    resized = np.stack([tensorflow_bilinear(image, 299) for image in IMAGES])
    network = bind_params(bind_init(InceptionV3), params)
    ours = jax.jit(lambda x: network(x))((resized - 128) / 128)
    assert expected.std() > 0.1
    assert relative(ours, expected) < 1e-5
