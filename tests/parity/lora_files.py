"""Random LoRA files for transformers, and the weights that diffusers and PEFT merge with them."""

import jax
import numpy as np
import peft
import torch

from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
from jaxdiff.models.lora import merge_adapters
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pretrained.lora import read_lora

RANK = 4


def spec_of(denoiser):
    """Return a specification with any text encoder, of the width that the denoiser reads."""
    text = ClipTextConfig(vocab_size=64, width=24, depth=1, heads=2, projection_dim=20)
    return TextToImage(
        denoiser=denoiser,
        conditioner=ClipConditioner(text=ClipTextEncoder(model=text), masked=False),
        prediction="velocity",
        schedule=RectifiedFlow(),
        image_size=16,
    )


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pairs(layers, down, up, *, alpha=None):
    """Return random adapters by name, for layers of (outputs, inputs)."""
    tensors = {}
    for i, (name, (outputs, inputs)) in enumerate(layers.items()):
        tensors[f"{name}.{down}.weight"] = 0.3 * random(RANK, inputs, seed=2 * i)
        tensors[f"{name}.{up}.weight"] = 0.3 * random(outputs, RANK, seed=2 * i + 1)
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    return tensors


def linear_layers(model):
    """Return (outputs, inputs) of the linear layers of a PyTorch model, by name."""
    modules = model.named_modules()
    return {n: tuple(m.weight.shape) for n, m in modules if isinstance(m, torch.nn.Linear)}


def tensors_of(model):
    """Return the weights of a PyTorch model, also of one with fused adapters."""
    return {
        name.replace(".base_layer.", "."): x.detach().numpy()
        for name, x in model.state_dict().items()
        if ".lora_" not in name and ".lokr_" not in name
    }


def converted(pipeline, tensors):
    """Return the adapters of a file by the names of one of diffusers' pipelines."""
    given = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    found = pipeline.lora_state_dict(given)
    return found[0] if isinstance(found, tuple) else found


def merged_by_diffusers(model, adapters):
    """Return the weights of one of diffusers' models with adapters, a dictionary or a file."""
    model.load_lora_adapter(adapters, prefix="transformer")
    model.fuse_lora()
    return tensors_of(model)


def merged_by_peft(model, names, folder):
    """Return the weights of a model with random adapters of some layers, saved in a folder."""
    config = peft.LoraConfig(
        target_modules=names, r=RANK, lora_alpha=2, init_lora_weights=False, use_rslora=True
    )
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(folder)
    adapted.merge_adapter()
    return tensors_of(adapted.get_base_model())


def merged_here(params, file, spec):
    """Return the denoiser's parameters, merged with the adapters of a file."""
    return jax.device_get(merge_adapters(params, read_lora(file, spec)["denoiser"]))


def assert_same_weights(found, wanted, before, changed):
    """Compare weights by name; `changed` is the number of those that the adapters change."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=1e-5, err_msg=name)
    assert sum(np.abs(wanted[name] - before[name]).max() > 1e-3 for name in wanted) == changed
