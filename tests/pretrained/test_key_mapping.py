import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import Autoencoder, AutoencoderConfig
from jaxdiff.models.layers import abstract_params, any_rngs
from jaxdiff.models.text_encoders.clip import (
    Clip,
    ClipConfig,
    ClipText,
    ClipTextConfig,
    ClipVisionConfig,
)
from jaxdiff.pretrained import autoencoder_keys, clip_keys
from jaxdiff.pretrained.key_mapping import from_torch_names
from jaxdiff.pretrained.safetensors_io import Renamed, TensorFiles, write_tensors

TEXT = ClipTextConfig(vocab_size=6, length=4, width=8, depth=2, heads=2, projection_dim=3)
VISION = ClipVisionConfig(
    image_size=4, patch_size=2, width=8, depth=3, heads=2, projection_dim=3, mlp_ratio=2.0
)
CLIP = ClipConfig(text=TEXT, vision=VISION)
AUTOENCODER = AutoencoderConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)


def random_params(network, config, dtype=np.float32) -> dict:
    params = abstract_params(lambda: network(config, rngs=any_rngs()))
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda p: draw.normal(size=p.shape).astype(dtype), params)


def text_tensors() -> dict:
    return clip_keys.clip_to_torch(random_params(ClipText, TEXT), TEXT)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert [x.dtype for x in jax.tree.leaves(ours)] == [x.dtype for x in jax.tree.leaves(theirs)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_clip_round_trips_bit_for_bit(dtype):
    params = random_params(Clip, CLIP, dtype)
    tensors = clip_keys.clip_to_torch(params, CLIP)
    assert_same(clip_keys.clip_from_torch(tensors, CLIP), params)


def test_autoencoder_round_trips_bit_for_bit():
    params = random_params(Autoencoder, AUTOENCODER)
    tensors = autoencoder_keys.autoencoder_to_torch(params)
    assert_same(autoencoder_keys.autoencoder_from_torch(tensors, AUTOENCODER), params)


def test_every_parameter_has_a_tensor_of_its_own():
    params = random_params(Clip, CLIP)
    tensors = clip_keys.clip_to_torch(params, CLIP)
    assert sum(t.size for t in tensors.values()) == sum(p.size for p in jax.tree.leaves(params))


def test_layers_are_unstacked_and_linear_kernels_transposed():
    params = random_params(ClipText, TEXT)
    tensors = clip_keys.clip_to_torch(params, TEXT)
    weight = tensors["text_model.encoder.layers.1.mlp.fc1.weight"]
    np.testing.assert_array_equal(weight, params["blocks"]["mlp_in"]["kernel"][1].T)
    assert weight.flags.c_contiguous


def test_convolutions_become_out_in_height_width():
    params = random_params(Autoencoder, AUTOENCODER)
    tensors = autoencoder_keys.autoencoder_to_torch(params)
    kernel = params["encoder"]["levels"][1]["blocks"][0]["conv1"]["kernel"]
    weight = tensors["encoder.down_blocks.1.resnets.0.conv1.weight"]
    assert weight.shape == (8, 4, 3, 3)
    np.testing.assert_array_equal(weight[5, 2], kernel[:, :, 2, 5])


def test_the_result_merges_into_a_model():
    params = random_params(ClipText, TEXT)
    model = nnx.eval_shape(lambda: ClipText(TEXT, rngs=any_rngs()))
    loaded = clip_keys.clip_from_torch(clip_keys.clip_to_torch(params, TEXT), TEXT)
    nnx.update(model, loaded)
    assert_same(jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model))), params)


def test_missing_tensors_are_named():
    tensors = text_tensors()
    del tensors["text_projection.weight"]
    with pytest.raises(UserError, match=r"missing tensors: text_projection\.weight;"):
        clip_keys.clip_from_torch(tensors, TEXT)


def test_many_missing_tensors_are_counted():
    with pytest.raises(UserError, match=r"missing tensors: .* and 32 more"):
        clip_keys.clip_from_torch({}, TEXT)


def test_unexpected_tensors_are_named():
    tensors = text_tensors() | {"text_model.extra.weight": np.zeros(3)}
    with pytest.raises(UserError, match=r"unexpected tensors: text_model\.extra\.weight;"):
        clip_keys.clip_from_torch(tensors, TEXT)


def test_misshapen_tensors_are_named_with_both_shapes():
    name = "text_model.encoder.layers.1.mlp.fc1.weight"
    tensors = text_tensors() | {name: np.zeros((32, 9))}
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.fc1\.weight is \(32, 9\), .* \(32, 8\)"):
        clip_keys.clip_from_torch(tensors, TEXT)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_weights_that_are_not_finite_are_named(dtype, value, leaf):
    tensors = clip_keys.clip_to_torch(random_params(ClipText, TEXT, dtype), TEXT)
    name = f"text_model.encoder.layers.1.mlp.fc1.{leaf}"
    tensors[name] = np.array(tensors[name])
    tensors[name][-1, ...] = value  # the last output: kernels are copied in parts
    message = rf"{name.replace('.', '[.]')} holds NaN or infinite numbers"
    with pytest.raises(UserError, match=message):
        clip_keys.clip_from_torch(tensors, TEXT)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_the_largest_and_smallest_numbers_are_finite(dtype):
    params = random_params(ClipText, TEXT, dtype)
    kernel = params["blocks"]["mlp_in"]["kernel"]
    kernel[0, 0, 0], kernel[0, 1, 0] = jnp.finfo(dtype).max, jnp.finfo(dtype).min
    assert_same(clip_keys.clip_from_torch(clip_keys.clip_to_torch(params, TEXT), TEXT), params)


def test_a_checkpoint_of_another_depth_is_refused():
    tensors = {k: v for k, v in text_tensors().items() if ".layers.1." not in k}
    with pytest.raises(UserError, match=r"missing tensors: .*layers\.1\."):
        clip_keys.clip_from_torch(tensors, TEXT)


def test_the_position_rows_of_old_checkpoints_are_ignored():
    tensors = text_tensors() | {"text_model.embeddings.position_ids": np.arange(4)[None]}
    assert clip_keys.clip_from_torch(tensors, TEXT)["token_embedding"].shape == (6, 8)


def test_an_encoder_saved_without_its_name_is_found():
    tensors = text_tensors()
    bare = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    assert "encoder.layers.0.layer_norm1.bias" in bare
    expected = clip_keys.clip_from_torch(tensors, TEXT)
    assert_same(clip_keys.clip_from_torch(bare, TEXT), expected)


def test_the_attention_of_old_autoencoders_is_found():
    params = random_params(Autoencoder, AUTOENCODER)
    new = autoencoder_keys.autoencoder_to_torch(params)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in new.items():
        for ours, theirs in names.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        old[name] = value
    assert old.keys() != new.keys()
    assert_same(autoencoder_keys.autoencoder_from_torch(old, AUTOENCODER), params)


@pytest.mark.parametrize(
    ("types", "widest"),
    [
        ((np.float16, np.float32), np.float32),
        ((np.float32, np.float16), np.float32),
        ((jnp.bfloat16, np.float16), np.float32),
        ((np.float64, np.float32), np.float64),
        ((jnp.bfloat16, jnp.bfloat16), jnp.bfloat16),
    ],
)
def test_a_stack_holds_the_numbers_of_all_its_layers(types, widest, tmp_path):
    file, kernel = epath.Path(tmp_path / "a.safetensors"), jnp.zeros((2, 3, 4))
    layers = [np.full((4, 3), jnp.finfo(dtype).max, dtype) for dtype in types]
    write_tensors(file, {f"p.{i}.weight": layer for i, layer in enumerate(layers)})
    tensors = Renamed(TensorFiles([file]), lambda name: name)
    found = from_torch_names(tensors, {"p": "p.{layer}"}, {"p": {"kernel": kernel}})["p"]["kernel"]
    assert found.dtype == widest
    np.testing.assert_array_equal(found, [layer.T.astype(widest) for layer in layers])


def test_the_host_holds_few_stacked_parameters_at_a_time():
    layers, width, names = 16, 128, [f"p{i}" for i in range(8)]
    stacked = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)
    tensors = {
        f"{name}.{layer}.weight": np.full((width, width), layer, np.float32)
        for name in names
        for layer in range(layers)
    }
    tracemalloc.start()
    try:
        sums = from_torch_names(
            tensors,
            {name: f"{name}.{{layer}}" for name in names},
            {name: {"kernel": stacked} for name in names},
            place=np.sum,
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert {float(x["kernel"]) for x in sums.values()} == {width**2 * layers * (layers - 1) / 2}
    assert peak < 3 * layers * width**2 * 4  # the readers are four
