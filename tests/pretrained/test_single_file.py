import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from jaxdiff.pretrained.safetensors_io import TensorFiles
from jaxdiff.pretrained.single_file import VARIANTS, objective_of

XL, _, V2, V1 = VARIANTS
SPEC = "modelspec.prediction_type"


@pytest.mark.parametrize(
    ("variant", "names", "metadata", "expected"),
    [
        (V1, [], {}, ("eps", False)),
        (V2, [], {}, ("v", False)),
        (V2, [], {SPEC: "epsilon"}, ("eps", False)),
        (V1, [], {SPEC: "v"}, ("v", False)),
        (V1, [], {SPEC: "something new"}, ("eps", False)),
        (XL, ["v_pred"], {}, ("v", False)),
        (XL, ["v_pred", "ztsnr"], {SPEC: "epsilon"}, ("v", True)),
    ],
)
def test_a_file_states_what_its_network_predicts(variant, names, metadata, expected, tmp_path):
    path = epath.Path(tmp_path) / "model.safetensors"
    save_file({name: np.empty(0, np.float32) for name in [*names, "other"]}, path, metadata)
    prediction, schedule = objective_of(variant, TensorFiles([path]))
    assert (prediction, schedule.zero_terminal_snr) == expected
