"""The same random T5 encoder, saved by transformers and read by jaxdiff, gives the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from jaxdiff.models.layers import bind_init, bind_params
from jaxdiff.models.text_encoders.t5 import T5Config, T5Encoder, position_buckets
from jaxdiff.pretrained import t5_keys

torch = pytest.importorskip("torch")

from tests.parity.torch_models import randomized, tensors_of

pytestmark = pytest.mark.parity

LENGTH = 24
SIZES = {
    "vocab_size": 50,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "feed_forward_proj": "gated-gelu",
}
IDS = np.random.default_rng(0).integers(0, 50, (3, LENGTH))
PADDING = np.array([0, 5, LENGTH - 1])
MASKS = {
    "none": None,
    "right": np.arange(LENGTH) < (LENGTH - PADDING)[:, None],
    "left": np.arange(LENGTH) >= PADDING[:, None],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model whose parameters are all random, and its folder."""
    torch.manual_seed(0)
    model = randomized(transformers.T5EncoderModel(transformers.T5Config(**SIZES)), 0.1)
    folder = tmp_path_factory.mktemp("t5")
    model.save_pretrained(folder)
    return model, folder


def load(tensors):
    config = t5_keys.read_t5_config(transformers.T5Config(**SIZES).to_dict())
    params = t5_keys.t5_from_torch(tensors, config)
    return bind_params(bind_init(T5Encoder, config), jax.tree.map(jnp.asarray, params)), params


@pytest.mark.parametrize("side", MASKS)
def test_tokens(side, saved):
    model, folder = saved
    mask = MASKS[side]
    inputs = {"input_ids": torch.from_numpy(IDS)}
    if mask is not None:
        inputs["attention_mask"] = torch.from_numpy(mask)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state.numpy()
    network, _ = load(load_file(folder / "model.safetensors"))
    found = network(jnp.asarray(IDS), None if mask is None else jnp.asarray(mask))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_tensors_read_and_written_are_the_same(saved):
    before = load_file(saved[1] / "model.safetensors")
    _, params = load(before)
    after = t5_keys.t5_to_torch(params)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)


@pytest.mark.parametrize("shared", [True, False])
def test_token_embeddings_may_be_stored_twice_or_under_their_other_name(shared, saved):
    before = load_file(saved[1] / "model.safetensors")
    table = before["shared.weight"] if shared else before.pop("shared.weight")
    _, params = load({**before, "encoder.embed_tokens.weight": table})
    np.testing.assert_array_equal(params["token_embedding"], table)


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 12), (64, 1000)])
def test_buckets_of_all_distances(buckets, most):
    """In float32 a distance at the border of two buckets may fall into either."""
    from transformers.models.t5.modeling_t5 import T5Attention

    positions = torch.arange(512)
    relative = positions[None, :] - positions[:, None]
    expected = T5Attention._relative_position_bucket(
        relative, num_buckets=buckets, max_distance=most
    )
    np.testing.assert_array_equal(position_buckets(512, buckets, most), expected.numpy())


def test_our_config_is_read_by_transformers():
    config = t5_keys.read_t5_config(transformers.T5Config(**SIZES).to_dict())
    theirs = transformers.T5Config(**t5_keys.write_t5_config(config))
    assert t5_keys.read_t5_config(theirs.to_dict()) == config


@pytest.mark.nightly
def test_one_layer_at_the_width_of_t5_xxl():
    """With 512 tokens and a vocabulary of 2048, which keeps memory below 4 GB."""
    sizes = t5_keys.write_t5_config(T5Config(vocab_size=2048, depth=1))
    assert (sizes["d_model"], sizes["num_heads"], sizes["d_ff"]) == (4096, 64, 10240)
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    ids = np.random.default_rng(0).integers(0, 2048, (1, 512))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).last_hidden_state.numpy()
    config = t5_keys.read_t5_config(sizes)
    params = t5_keys.t5_from_torch(tensors_of(model), config)
    build = bind_init(T5Encoder, config)
    found = jax.jit(lambda params, ids: bind_params(build, params)(ids))(params, ids)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
