"""The same random Qwen3, saved by transformers, gives the same hidden states in jaxdiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from etils import epath
from safetensors.numpy import load_file, save_file

from jaxdiff.models.layers import bind_build, bind_params
from jaxdiff.models.text_encoders.qwen3 import Qwen3Config, Qwen3TextEncoder
from jaxdiff.pretrained import qwen3_keys
from jaxdiff.pretrained.safetensors_io import open_weights

torch = pytest.importorskip("torch")

from tests.parity.torch_models import randomized

pytestmark = pytest.mark.parity

DEPTH, LENGTH = 4, 12
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
IDS = np.random.default_rng(0).integers(0, 50, (3, LENGTH))
PADDING = np.array([0, 3, LENGTH - 1])
SIDES = {
    "right": np.arange(LENGTH) < (LENGTH - PADDING)[:, None],
    "left": np.arange(LENGTH) >= PADDING[:, None],
}


def random_model(kind=transformers.Qwen3ForCausalLM, **changes):
    """A model whose parameters are all random, norms too."""
    torch.manual_seed(0)
    return randomized(kind(transformers.Qwen3Config(**{**SIZES, **changes})), 0.1)


def hidden_states(model, mask, dtype=None):
    inputs = {"input_ids": torch.from_numpy(IDS), "attention_mask": torch.from_numpy(mask)}
    with torch.no_grad():
        states = model.to(dtype)(**inputs, output_hidden_states=True).hidden_states
    return [state.float().numpy() for state in states]


def read(folder, layers, length=LENGTH) -> tuple[Qwen3TextEncoder, dict]:
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    encoder = Qwen3TextEncoder(
        model=qwen3_keys.read_qwen3_config(config), hidden_layers=layers, max_length=length
    )
    tensors = open_weights(epath.Path(folder), "model")
    return encoder, qwen3_keys.qwen3_from_torch(tensors, encoder)


def encode(encoder, params, mask):
    network = bind_params(bind_build(encoder), jax.tree.map(jnp.asarray, params))
    return [np.asarray(x, np.float32) for x in network(jnp.asarray(IDS), jnp.asarray(mask))]


@pytest.mark.parametrize("side", SIDES)
def test_every_hidden_state(side, tmp_path):
    """Padding included: FLUX.2's denoiser reads it."""
    model = random_model()
    model.save_pretrained(tmp_path)
    expected = hidden_states(model, SIDES[side])
    encoder, params = read(tmp_path, tuple(range(DEPTH + 1)))
    found = encode(encoder, params, SIDES[side])
    assert len(found) == len(expected) == DEPTH + 1
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layers", [(1,), (1, 3), (0, 2)])
def test_blocks_above_the_last_hidden_state_are_not_loaded(layers, tmp_path):
    model = random_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    encoder, params = read(tmp_path, layers)
    assert set(params) == {"token_embedding", "blocks"}
    assert {x.shape[0] for x in jax.tree.leaves(params["blocks"])} == {layers[-1]}
    expected = hidden_states(model, SIDES["right"])
    for ours, layer in zip(encode(encoder, params, SIDES["right"]), layers, strict=True):
        np.testing.assert_allclose(ours, expected[layer], atol=1e-4, rtol=0)


def test_bfloat16_weights_compute_in_bfloat16(tmp_path):
    model = random_model()
    expected = hidden_states(model, SIDES["right"])[2]
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    encoder, params = read(tmp_path, (2,))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    network = bind_params(bind_build(encoder), jax.tree.map(jnp.asarray, params))
    (found,) = network(jnp.asarray(IDS), jnp.asarray(SIDES["right"]))
    assert found.dtype == jnp.bfloat16
    theirs = hidden_states(model, SIDES["right"], torch.bfloat16)[2]
    ours_away = np.abs(np.asarray(found, np.float32) - expected).mean()
    assert ours_away <= 1.2 * np.abs(theirs - expected).mean()


@pytest.mark.parametrize("kind", [transformers.Qwen3ForCausalLM, transformers.Qwen3Model])
def test_tensors_read_and_written_are_the_same(kind, tmp_path):
    model = random_model(kind, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    encoder, params = read(tmp_path, (1, 3))
    unused = qwen3_keys.qwen3_unused(before, encoder)
    after = qwen3_keys.qwen3_to_torch(params, encoder, unused)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)


@pytest.mark.parametrize("layers", [(1, 3), (DEPTH,)])
def test_without_the_unused_blocks_transformers_gives_the_same_hidden_states(layers, tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    expected = hidden_states(model, SIDES["left"])
    encoder, params = read(tmp_path, layers)
    written = tmp_path / "written"
    written.mkdir()
    save_file(
        qwen3_keys.qwen3_to_torch(params, encoder),
        written / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = transformers.Qwen3Config(**qwen3_keys.write_qwen3_config(encoder, whole=False))
    config.save_pretrained(written)
    found = hidden_states(transformers.Qwen3Model.from_pretrained(written), SIDES["left"])
    for layer in layers:
        np.testing.assert_allclose(found[layer], expected[layer], atol=1e-5, rtol=0)
    assert read(written, layers)[0].hidden_layers == layers


@pytest.mark.nightly
def test_two_layers_at_the_width_of_qwen3_4b(tmp_path):
    """With 512 tokens and a vocabulary of 2048, which keeps memory below 4 GB."""
    sizes = qwen3_keys.write_qwen3_config(
        Qwen3TextEncoder(model=Qwen3Config(vocab_size=2048, depth=3), hidden_layers=(2,)),
        whole=True,
    )
    config = transformers.Qwen3Config(**sizes)
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (2560, 32, 128)
    torch.manual_seed(0)
    model = transformers.Qwen3Model(config).eval()
    model.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 2048, (2, 512)), np.arange(512) < np.array([[40], [512]])
    with torch.no_grad():
        expected = model(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), output_hidden_states=True
        ).hidden_states
    encoder, params = read(tmp_path, (1, 2), length=512)
    build = bind_build(encoder)
    run = jax.jit(lambda params, ids, mask: bind_params(build, params)(ids, mask))
    for layer, ours in zip((1, 2), run(params, ids, mask), strict=True):
        theirs = expected[layer].numpy()
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
