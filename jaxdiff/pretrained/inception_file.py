"""The weights of the FID Inception, under the names of pytorch-fid and torch-fidelity."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from jaxdiff.errors import UserError
from jaxdiff.models.image_encoders.inception import InceptionV3
from jaxdiff.models.layers import abstract_params, bind_init
from jaxdiff.pretrained.key_mapping import Path, flatten_params, from_torch_names
from jaxdiff.pretrained.safetensors_io import Renamed, TensorFiles, open_weights, shapes

_LEAVES = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "variance": "bn.running_var",
}
_CLASSES = 1008  # of its classifier, which torchvision's network of the same name lacks


def inception_from_torch(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the parameters of `InceptionV3` from the tensors of a checkpoint.

    Raises:
      UserError: tensors are missing or of another shape, or the network is torchvision's.
    """
    classes = shapes(tensors).get("fc.bias", (_CLASSES,))
    if classes != (_CLASSES,) or any(name.startswith("AuxLogits.") for name in tensors):
        raise UserError(
            "The weights are those of torchvision's Inception-v3, whose features are others: "
            "expected the FID Inception, of pt_inception-2015-12-05 or weights-inception-"
            "2015-12-05; convert that file to safetensors."
        )
    abstract = abstract_params(bind_init(InceptionV3))
    table = {".".join(map(str, path)): _name(path) for path in flatten_params(abstract)}
    unused = ("fc.", "num_batches_tracked")
    used = Renamed(tensors, lambda name: None if any(x in name for x in unused) else name)
    return from_torch_names(used, table, abstract, what="Inception-v3")


def _name(path: Path) -> str:
    *modules, leaf = map(str, path)
    return ".".join([*modules, _LEAVES[leaf]])


def open_tensors(path: epath.Path) -> TensorFiles:
    """Open a safetensors file, or the `model.safetensors` of a folder.

    Raises:
      UserError: there is none, or it is damaged or pickled.
    """
    return TensorFiles([path]) if path.is_file() else open_weights(path, "model")
