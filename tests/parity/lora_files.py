"""LoRA files with random adapters, and the weights that PyTorch's libraries merge with them."""

import numpy as np

RANK = 4


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pairs(layers, down, up, *, alpha=None):
    """Random adapters by name, for layers of (outputs, inputs)."""
    tensors = {}
    for i, (name, (outputs, inputs)) in enumerate(layers.items()):
        tensors[f"{name}.{down}.weight"] = 0.3 * random(RANK, inputs, seed=2 * i)
        tensors[f"{name}.{up}.weight"] = 0.3 * random(outputs, RANK, seed=2 * i + 1)
        if alpha is not None and "final_layer" not in name:  # where diffusers ignores it
            tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    return tensors


def tensors_of(model):
    """Weights of a model of PyTorch, also with fused adapters."""
    return {
        name.replace(".base_layer.", "."): x.detach().numpy()
        for name, x in model.state_dict().items()
        if ".lora_" not in name and ".lokr_" not in name
    }


def check_merged(found, wanted, before, changed):
    """Compare merged weights by name; `changed` counts those that differ from before."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=1e-5, err_msg=name)
    moved = {name for name in wanted if np.abs(wanted[name] - before[name]).max() > 1e-3}
    assert len(moved) == changed
