"""Keys of a class's arguments, and random inputs, for all networks whose configs are compared."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxdiff.models.layers import any_rngs, bind_params


def signature(kind):
    """Return the arguments of a class, with their defaults."""
    return {
        key: x.default
        for key, x in list(inspect.signature(kind.__init__).parameters.items())[1:]
        if x.kind is not inspect.Parameter.VAR_KEYWORD
    }


def to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def bound(network, params):
    return bind_params(lambda: network(rngs=any_rngs()), jax.tree.map(jnp.asarray, params))


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)
