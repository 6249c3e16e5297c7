import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from jaxdiff.errors import UserError
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.pretrained.safetensors_io import Renamed, TensorFiles, open_weights, shapes

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float16)


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def test_a_whole_file_is_read_tensor_by_tensor(folder):
    save_file({"a": A, "b": B}, folder / "model.safetensors")
    tensors = open_weights(folder, "model")
    assert shapes(tensors) == {"a": (2, 3), "b": (4,)}
    np.testing.assert_array_equal(tensors["a"], A)
    assert tensors["b"].dtype == np.float16
    renamed = Renamed(tensors, lambda name: {"a": "c"}.get(name))
    assert list(renamed) == ["c"]
    np.testing.assert_array_equal(renamed["c"], A)


def test_shards_and_half_precision_are_found(folder):
    save_file({"a": A}, folder / "model-1.safetensors")
    save_file({"b": B}, folder / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(open_weights(folder, "model")) == {"a", "b"}
    for variant, value in ((".bf16", {"a": A}), (".fp16", {"b": B}), ("", {"c": A})):
        save_file(value, folder / f"other{variant}.safetensors")
        assert set(open_weights(folder, "other")) == set(value)


def test_a_missing_shard_is_reported(folder):
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks the shard model-1\.safetensors"):
        open_weights(folder, "model")


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}', "[" * 9999, "\0"]
)
def test_an_index_that_is_none_is_reported(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        open_weights(folder, "model")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a/b"])
def test_a_shard_never_leaves_its_folder(folder, name):
    text = json.dumps({"weight_map": {"a": name}})
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="outside its folder"):
        open_weights(folder, "model")


def test_pickled_weights_are_never_opened(folder):
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(UserError, match="pickled"):
        open_weights(folder, "model")


def test_quantised_weights_are_refused(folder):
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="holds only GGUF's quantised weights"):
        open_weights(folder, "model")
    with pytest.raises(UserError, match=r"or are quantised, such as \.gguf"):
        load_bundle(folder / "model-Q4_K_M.gguf")


def test_no_weights_are_reported(folder):
    with pytest.raises(UserError, match=r"holds no weights: expected model\.safetensors"):
        open_weights(folder, "model")


@pytest.mark.parametrize("keep", [0, 5, -1])
def test_a_file_that_is_cut_off_is_reported(folder, keep):
    save_file({"a": A}, path := folder / "model.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut off"):
        TensorFiles([path])


def test_tensors_of_every_type_and_of_no_size_are_read(folder):
    kinds = ("float64", "float16", "bfloat16", "int64", "int8", "bool")
    tensors = {kind: np.arange(3).astype(jnp.dtype(kind)) for kind in kinds}
    tensors["none"] = np.empty((0, 4), np.float32)
    save_file(tensors, path := folder / "model.safetensors")
    read = TensorFiles([path])
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)


def test_what_is_written_to_a_tensor_stays_out_of_the_file(folder):
    save_file({"a": A}, path := folder / "model.safetensors")
    TensorFiles([path])["a"][:] = 7
    np.testing.assert_array_equal(TensorFiles([path])["a"], A)


def test_numbers_of_an_unknown_type_are_reported(folder):
    header = {"a": {"dtype": "F8_E5M2", "shape": [8], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    (path := folder / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + bytes(8)
    )
    with pytest.raises(UserError, match=r"a is of type F8_E5M2: .* BF16, .* not quantised"):
        TensorFiles([path])


def write_header(path, header, size):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))


def entry(**changes):
    return {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **changes}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(data_offsets=[-1, 63])},
        {"a": entry(), "b": entry()},
        {"a": entry(data_offsets=[8, 72])},
        {"a": entry(shape=[4, 5])},
        {"a": entry(shape=[-4, -4])},
        {"a": entry(shape=[2**62, 2**62])},
        {"a": entry(shape=[4.0, 4])},
        {"a": entry(dtype="X")},
        {"a": {}},
        {"__metadata__": {"a": 1}, "a": entry()},
        {"__metadata__": [], "a": entry()},
        b"null",
        b"[" * 100_000,
        b"",
        b'{"\\ud800": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}',
    ],
    ids=str,
)
def test_headers_that_contradict_the_file_are_reported(header, folder):
    write_header(folder / "a.safetensors", header, 64)
    with pytest.raises(UserError, match=r"a\.safetensors is damaged or cut off"):
        TensorFiles([folder / "a.safetensors"])


@pytest.mark.parametrize("length", [0, 10**8, 2**63, 2**64 - 1])
def test_lengths_of_headers_that_cannot_be_are_reported(length, folder):
    (folder / "a.safetensors").write_bytes(length.to_bytes(8, "little") + bytes(64))
    with pytest.raises(UserError, match="is damaged or cut off"):
        TensorFiles([folder / "a.safetensors"])


def test_a_tensor_is_in_a_file_and_in_a_model_once(folder):
    one, other = json.dumps(entry()), json.dumps(entry(dtype="F16"))
    write_header(folder / "a.safetensors", f'{{"a": {other}, "a": {one}}}'.encode(), 64)
    with pytest.raises(UserError, match="twice"):
        TensorFiles([folder / "a.safetensors"])
    for name in ("b", "c"):
        write_header(folder / f"{name}.safetensors", {"a": entry()}, 64)
    with pytest.raises(UserError, match=r"c\.safetensors repeats a of another shard"):
        TensorFiles([folder / "b.safetensors", folder / "c.safetensors"])


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", "\0", "[" * 1000]
)
def test_other_indices_are_reported(text, folder):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        open_weights(folder, "model")
