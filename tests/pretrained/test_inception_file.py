"""Weights of the FID Inception: what is read, and what is refused."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.errors import UserError
from jaxdiff.evaluation.features import ClipFeatures, InceptionFeatures, features_of
from jaxdiff.models.image_encoders.inception import InceptionV3
from jaxdiff.models.layers import abstract_params, bind_init
from jaxdiff.pretrained.inception_file import inception_from_torch
from jaxdiff.pretrained.key_mapping import flatten_params

LAST = "Mixed_7c.branch_pool"


@pytest.fixture(scope="module")
def tensors():
    """A checkpoint of zeros, as PyTorch saves it, with a classifier and counters."""
    names = {
        "scale": "bn.weight",
        "bias": "bn.bias",
        "mean": "bn.running_mean",
        "variance": "bn.running_var",
    }
    found = {"fc.weight": np.zeros((1008, 2048), np.float32), "fc.bias": np.zeros(1008, np.float32)}
    for (*modules, leaf), value in flatten_params(abstract_params(bind_init(InceptionV3))).items():
        module, shape = ".".join(modules), value.shape
        if leaf == "kernel":
            shape = (shape[3], shape[2], shape[0], shape[1])
            found[f"{module}.bn.num_batches_tracked"] = np.zeros((), np.int64)
        zeros = np.broadcast_to(np.zeros((), np.float32), shape)
        found[f"{module}.{names.get(leaf, 'conv.weight')}"] = zeros
    return found


def test_each_tensor_of_the_features_is_read(tensors):
    last = np.arange(192, dtype=np.float32)
    params = inception_from_torch({**tensors, f"{LAST}.bn.running_mean": last})
    np.testing.assert_array_equal(params["Mixed_7c"]["branch_pool"]["mean"], last)
    assert len(flatten_params(params)) == 5 * 94  # convolutions


def test_other_networks_are_refused(tensors):
    with pytest.raises(UserError, match="are those of torchvision's Inception-v3"):
        inception_from_torch({**tensors, "fc.bias": np.zeros(1000, np.float32)})
    with pytest.raises(UserError, match="are those of torchvision's Inception-v3"):
        inception_from_torch({**tensors, "AuxLogits.fc.bias": np.zeros(1000, np.float32)})
    fewer = {name: x for name, x in tensors.items() if name != f"{LAST}.bn.bias"}
    with pytest.raises(UserError, match=rf"Inception-v3: missing tensors: {LAST}\.bn\.bias"):
        inception_from_torch(fewer)


def test_the_kind_of_a_feature_network_is_found(tmp_path):
    file = tmp_path / "inception.safetensors"
    save_file({"other": np.zeros(2, np.float32)}, file)
    features = features_of(str(file), "pytorch")
    assert features == InceptionFeatures(weights=str(file), resize="pytorch")
    with pytest.raises(UserError, match="Inception-v3: missing tensors"):
        features.load()
    assert features_of("shipped:produce_clip") == ClipFeatures()
    with pytest.raises(UserError, match="--resize has no effect on shipped:produce_clip"):
        features_of("shipped:produce_clip", "pytorch")
    with pytest.raises(UserError, match="holds no weights"):
        features_of(str(tmp_path / "none")).load()
    with pytest.raises(UserError, match="produce is of type TextToImage: expected a CLIP"):
        features_of("shipped:produce").load()
