"""Each key of the networks' configs is followed, refused by name, or without effect there as here.

Random weights of the same seed stand for a checkpoint. Each changed config is built by diffusers or
transformers and read by jaxdiff; where both accept it, the outputs are compared.
"""

import json

import numpy as np
import pytest

from jaxdiff.errors import UserError
from jaxdiff.io.text import parse_json
from jaxdiff.pretrained.config_check import Unused
from jaxdiff.pretrained.stable_diffusion import INDEX_KEYS, PIPELINES

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tests.parity.networks.autoencoders import VAE, Flux2VAE, Tiny
from tests.parity.networks.denoisers import Flux1, Flux2, UNet, ZImageTransformer
from tests.parity.networks.keys_and_inputs import signature
from tests.parity.networks.text_encoders import T5, BothClips, Qwen, Text, TextProjection
from tests.parity.torch_models import tensors_of

pytestmark = pytest.mark.parity

NETWORKS = [
    UNet,
    ZImageTransformer,
    Flux1,
    Flux2,
    VAE,
    Flux2VAE,
    Tiny,
    Text,
    TextProjection,
    BothClips,
    Qwen,
    T5,
]
BASES = [(network, base) for network in NETWORKS for base in network.bases]
# Followed, refused and without effect: some keys of each network. The others are tested nightly.
SAMPLE = [
    (UNet, "1.x", "class_embed_type"),
    (UNet, "1.x", "act_fn"),
    (Flux1, "schnell", "axes_dims_rope"),
    (Flux1, "dev", "out_channels"),
    (Flux2, "klein", "mlp_ratio"),
    (Flux2, "dev", "guidance_embeds"),
    (VAE, "KL", "act_fn"),
    (VAE, "KL", "mid_block_add_attention"),
    (ZImageTransformer, "Z-Image", "axes_lens"),
    (ZImageTransformer, "Z-Image", "n_kv_heads"),
    (Flux2VAE, "FLUX.2", "decoder_block_out_channels"),
    (Flux2VAE, "FLUX.2", "batch_norm_eps"),
    (Tiny, "tiny", "latent_magnitude"),
    (Tiny, "tiny", "num_decoder_blocks"),
    (Text, "2.x", "eos_token_id"),
    (TextProjection, "XL", "projection_dim"),
    (BothClips, "CLIP", "vision_config.patch_size"),
    (Qwen, "3", "rope_parameters"),
    (T5, "v1.1", "feed_forward_proj"),
]


def randomized(model):
    """Set every parameter at random, whatever its initialisation."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model.eval()


def full(network, base):
    """Return a base config with all keys, as the library writes it."""
    if hasattr(network, "config_kind"):
        config = network.config_kind(**network.bases[base]).to_dict()
    else:
        config = {**signature(network.kind), **network.bases[base]}
    return json.loads(json.dumps(config))


def changed(config, key, value):
    *section, last = key.split(".")
    if section:
        return {**config, section[0]: {**config[section[0]], last: value}}
    return {**config, key: value}


def values_of(network, base, key):
    """Other values of a key: those of the network, or a switch flipped, or a number changed."""
    name = key.rpartition(".")[2]
    if name in network.values:
        return network.values[name]
    config = full(network, base)
    section, _, _ = key.rpartition(".")
    default = (config[section] if section else config).get(name)
    if isinstance(default, bool) or default is None:
        return [not default, None]
    assert isinstance(default, int | float), f"no other values are known for {key}"
    return [default + 1, default / 2] if default else [default + 1]


def read(network, config):
    """Return the specification of a config, or the message of its refusal."""
    try:
        return network.read(parse_json(json.dumps(config), "config", infinities=True))
    except UserError as error:
        return str(error)


def expected_of(network, config):
    """Return their output and tensors, or None where they fail or give NaN."""
    try:
        if hasattr(network, "config_kind"):
            model = randomized(network.kind(network.config_kind(**config)))
        else:
            model = randomized(network.kind.from_config(config))
        with torch.no_grad():
            output = network.theirs(model, config)
    except Exception:  # an odd value may fail anywhere
        return None
    return (output, tensors_of(model)) if np.isfinite(output).all() else None


def outcome(network, base, key, value):
    """Return what is wrong, or "" for a value that is followed, refused or without effect."""
    config = changed(full(network, base), key, value)
    spec, name = read(network, config), key.rpartition(".")[2]
    if isinstance(spec, str):
        return "" if name in spec else f"refused without its name: {spec}"
    expected = expected_of(network, config)
    if expected is None:
        return ""
    output, tensors = expected
    try:
        found = np.asarray(network.ours(spec, tensors, config))
    except UserError as error:
        return "" if name in str(error) else f"refused without its name: {error}"
    if found.shape != output.shape:
        return f"{found.shape} instead of {output.shape}"
    away = np.abs(found - output).max() / np.ptp(output)
    if not away <= 1e-3:
        return f"{away:.1e} away"
    if isinstance(network.schema.get(key), Unused):
        unchanged, _ = expected_of(network, full(network, base))
        if not np.array_equal(output, unchanged):
            return "declared without effect, and has one"
    return ""


def wrong_of(network, base, key):
    for value in values_of(network, base, key):
        if why := outcome(network, base, key, value):
            yield f"{network.__name__} {base}, {key}={value!r}: {why}"


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_every_key_is_declared(network):
    assert [key for key in network.keys if key not in network.schema] == []


@pytest.mark.nightly
@pytest.mark.parametrize(("network", "base"), BASES)
def test_the_base_is_followed(network, base):
    config = full(network, base)
    output, tensors = expected_of(network, config)
    found = np.asarray(network.ours(read(network, config), tensors, config))
    assert np.abs(found - output).max() <= 1e-3 * np.ptp(output)


@pytest.mark.parametrize(("network", "base", "key"), SAMPLE)
def test_some_keys(network, base, key):
    assert list(wrong_of(network, base, key)) == []


@pytest.mark.nightly
@pytest.mark.parametrize(("network", "base"), BASES)
def test_all_keys(network, base):
    assert [why for key in network.keys for why in wrong_of(network, base, key)] == []


@pytest.mark.parametrize("name", PIPELINES)
def test_every_key_of_an_index_is_declared(name):
    given = signature(getattr(diffusers, name))
    schema = INDEX_KEYS["XL" in name]
    assert [key for key in given if key not in schema] == []
