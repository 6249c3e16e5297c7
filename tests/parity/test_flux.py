"""FLUX transformers with the same random weights predict in diffusers and in jaxdiff alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.denoisers.flux import FLUX1 as FLUX1_CONFIG
from jaxdiff.models.denoisers.flux import FluxConfig
from jaxdiff.models.layers import abstract_params, bind_build, bind_params
from jaxdiff.pretrained import flux_keys
from jaxdiff.pretrained.flux_original import flux_to_original, original_flux_rename
from jaxdiff.pretrained.key_mapping import flatten_params, locate
from jaxdiff.pretrained.safetensors_io import Renamed

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tests.parity.torch_models import randomized, relative, tensors_of
from tests.parity.training_loss import assert_training_loss

pytestmark = pytest.mark.parity

FLUX1 = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}
FLUX2 = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}
WIDE = {  # FLUX.2-klein 4B with few blocks
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
VARIANTS = {
    "FLUX.1 schnell": FLUX1,
    "FLUX.1 dev": {**FLUX1, "guidance_embeds": True},
    "FLUX.2 klein": FLUX2,
    "FLUX.2 dev": {**FLUX2, "guidance_embeds": True},
    "klein 4B": WIDE,
}
SIZES = (4, 6), (8, 2)  # of tokens
WORDS = 7


def is_first(name):
    return name.startswith("FLUX.1")


@functools.cache
def torch_flux(name: str):
    torch.manual_seed(0)
    kind = diffusers.FluxTransformer2DModel if is_first(name) else diffusers.Flux2Transformer2DModel
    return randomized(kind(**VARIANTS[name]), 0.02)


@functools.cache
def ours(name: str):
    read = flux_keys.read_flux1_config if is_first(name) else flux_keys.read_flux2_config
    model = torch_flux(name)
    config = read({**model.config})
    return config, flux_keys.flux_from_torch(tensors_of(model), config, place=jnp.asarray)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(config, rows, columns, references):
    """x_t, t and conditioning, of two images; reference images have other sizes."""
    p = config.patch_size
    x = random(2, rows * p, columns * p, config.channels)
    cond = Conditioning(tokens=random(2, WORDS, config.text_width, seed=1))
    if config.pooled_width is not None:
        cond = cond._replace(pooled=random(2, config.pooled_width, seed=2))
    if config.guidance_embedding:
        cond = cond._replace(guidance=np.float32([3.5, 2]))
    if references:
        sizes = ((2, 3), (4, 2))[:references]
        images = [jnp.asarray(random(2, *size, config.channels, seed=3)) for size in sizes]
        tokens, positions = config.reference_tokens(images)
        cond = cond._replace(reference=tokens, reference_positions=positions)
    return x, np.float32([0.37, 0.83]), cond


def theirs(name, x, t, cond, sizes):
    """diffusers' prediction, packed and with the positions as its pipelines make them."""
    model, config = torch_flux(name), ours(name)[0]
    rows, columns = x.shape[1] // config.patch_size, x.shape[2] // config.patch_size
    nchw = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    options = {}
    if is_first(name):
        pipeline = diffusers.FluxPipeline
        packed = pipeline._pack_latents(nchw, 2, config.channels, *nchw.shape[2:])
        ids = pipeline._prepare_latent_image_ids(2, rows, columns, "cpu", torch.float32)
        words = torch.zeros(WORDS, 3)
        options["pooled_projections"] = torch.from_numpy(cond.pooled)
    else:
        pipeline = diffusers.Flux2KleinPipeline
        packed, ids = pipeline._pack_latents(nchw), pipeline._prepare_latent_ids(nchw)
        words = pipeline._prepare_text_ids(torch.from_numpy(cond.tokens))
        if sizes:
            images = [torch.zeros(1, config.channels, *size) for size in sizes]
            more = pipeline._prepare_image_ids(images)
            packed = torch.cat([packed, torch.from_numpy(np.array(cond.reference))], dim=1)
            ids = torch.cat([ids, more.expand(2, -1, -1)], dim=1)
    if cond.guidance is not None:
        options["guidance"] = torch.from_numpy(cond.guidance)
    out = model(
        packed,
        encoder_hidden_states=torch.from_numpy(cond.tokens),
        timestep=torch.from_numpy(t),
        img_ids=ids,
        txt_ids=words,
        **options,
    ).sample[:, : rows * columns]
    if is_first(name):
        out = pipeline._unpack_latents(out, rows * 16, columns * 16, 8)
    else:
        out = pipeline._unpack_latents_with_ids(out, ids[:, : rows * columns])
    return out.permute(0, 2, 3, 1)


@functools.cache
def predict(config, gradients=False):
    def call(params, x, t, cond):
        return bind_params(bind_build(config), params)(x, t, cond)

    def loss(params, x, t, cond, target):
        return jnp.mean((call(params, x, t, cond) - target) ** 2)

    return jax.jit(jax.grad(loss) if gradients else call)


CASES = [
    *((name, size, 0) for name in VARIANTS if name != "klein 4B" for size in SIZES),
    *(("FLUX.2 klein", SIZES[0], count) for count in (1, 2)),
    ("FLUX.2 dev", SIZES[1], 2),
    pytest.param("klein 4B", (16, 12), 1, marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("name", "size", "references"), CASES)
def test_predictions_and_gradients_are_diffusers(name, size, references):
    config, params = ours(name)
    x, t, cond = inputs(config, *size, references)
    expected = theirs(name, x, t, cond, ((2, 3), (4, 2))[:references])
    assert relative(predict(config)(params, x, t, cond), expected.detach().numpy()) < 1e-5
    target = random(*x.shape, seed=4)
    model = torch_flux(name)
    model.zero_grad()
    torch.mean((expected - torch.from_numpy(target)) ** 2).backward()
    wanted = {key: p.grad.numpy() for key, p in model.named_parameters()}
    del model, expected
    torch_flux.cache_clear()  # of the full width its weights alone take 2.5 GB
    found = predict(config, gradients=True)(params, x, t, cond, target)
    found = flux_keys.flux_to_torch(jax.device_get(found), config)
    assert found.keys() == wanted.keys()
    norms = {key: np.linalg.norm(gradient) for key, gradient in wanted.items()}
    errors = {key: np.linalg.norm(found[key] - gradient) for key, gradient in wanted.items()}
    norm, error = (np.linalg.norm([*x.values()]) for x in (norms, errors))
    assert min(norms.values()) > 0
    for key in wanted:
        assert errors[key] < 1e-4 * max(norms[key], 1e-3 * norm), key
    assert error < 1e-4 * norm


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "klein 4B"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_and_config_return_bit_for_bit(name, dtype):
    model, (config, _) = torch_flux(name), ours(name)
    tensors = {key: np.asarray(jnp.asarray(x, dtype)) for key, x in tensors_of(model).items()}
    params = flux_keys.flux_from_torch(tensors, config, place=np.asarray)
    back = flux_keys.flux_to_torch(params, config)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype
        assert back[key].tobytes() == np.ascontiguousarray(tensor).tobytes()
    written = flux_keys.write_flux_config(config)
    known = {key: value for key, value in model.config.items() if not key.startswith("_")}
    kind = written.pop("_class_name")
    assert kind == type(model).__name__
    assert written == {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}


@pytest.mark.parametrize("name", ["FLUX.1 dev", "FLUX.2 dev"])
def test_files_of_the_original_code_are_read_as_diffusers_reads_them(name):
    """diffusers' converter knows one width of FLUX.1; rows have few columns here."""
    from diffusers.loaders import single_file_utils

    kind = "flux" if is_first(name) else "flux2"
    convert = getattr(single_file_utils, f"convert_{kind}_transformer_checkpoint_to_diffusers")
    like = FLUX1_CONFIG if is_first(name) else FluxConfig()
    config = dataclasses.replace(like, double_depth=2, single_depth=2, guidance_embedding=True)
    rng, rows = np.random.default_rng(0), {}
    for path, value in flatten_params(abstract_params(bind_build(config))).items():
        table = flux_keys.FLUX1_NAMES if is_first(name) else flux_keys.FLUX2_NAMES
        tensor = locate(path, value.shape, table)
        for theirs in tensor.names():
            size = value.shape[-1]
            rows[theirs] = rng.normal(size=(size, 2) if tensor.is_kernel else (size,))
    original = flux_to_original(rows, config)
    wanted = convert({key: torch.from_numpy(x) for key, x in original.items()})
    found = Renamed(original, original_flux_rename(config))
    assert found.keys() == wanted.keys() == rows.keys()
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(found[key], tensor.numpy())
        np.testing.assert_array_equal(found[key], rows[key])


@pytest.mark.parametrize("name", ["FLUX.1 dev", "FLUX.2 klein"])
def test_the_training_loss_is_diffusers(name):
    config, params = ours(name)
    latents, _, cond = inputs(config, *SIZES[0], 0)
    assert_training_loss(
        functools.partial(predict(config), params),
        lambda x_t, t, cond: theirs(name, x_t, t, cond, ()),
        latents,
        cond,
    )
