"""Merge adapters and added tokens into a model's weights, for other libraries' formats."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxdiff.errors import UserError
from jaxdiff.models.conditioning import ClipTextEncoder
from jaxdiff.models.lora import Changes, Factors, Path, factors, merge_adapters
from jaxdiff.models.text_to_image import AnyConditioner, Params
from jaxdiff.pretrained.bundle import Bundle


def merge_additions(bundle: Bundle) -> Bundle:
    """Merge a model's adapters and added tokens into its networks' weights."""
    params = dict(bundle.params)
    adapters, rows = params.pop("adapters", {}), params.pop("added_tokens", {})
    if adapters:
        params = merge_into(params, split_adapters(adapters))
    if not rows:
        return bundle._replace(params=params)
    conditioner, encoders = bundle.spec.conditioner, dict(params["text_encoders"])
    for name, added in rows.items():
        table = jnp.asarray(encoders[name]["token_embedding"])
        table = jnp.concatenate([table, jnp.asarray(added, table.dtype)])
        encoders[name] = {**encoders[name], "token_embedding": table}
        conditioner = _with_vocabulary(conditioner, name, len(table))
    spec = dataclasses.replace(bundle.spec, conditioner=conditioner)
    return bundle._replace(spec=spec, params={**params, "text_encoders": encoders})


def split_adapters(adapters: Params) -> dict[str, dict[Path, Factors]]:
    """Return `params["adapters"]` by part, `denoiser` or the name of a text encoder."""
    parts = {name: adapters[name] for name in ("denoiser",) if name in adapters}
    parts |= adapters.get("text_encoders", {})
    return {name: factors(part) for name, part in parts.items()}


def merge_into(params: Params, adapters: Changes) -> dict[str, Any]:
    """Add adapters and changes to the networks' weights."""
    params, encoders = dict(params), dict(params["text_encoders"])
    for name, layers in adapters.items():
        if name == "denoiser":
            params["denoiser"] = merge_adapters(params["denoiser"], layers)
        else:
            encoders[name] = merge_adapters(encoders[name], layers)
    return {**params, "text_encoders": encoders}


def _with_vocabulary(conditioner: AnyConditioner, name: str, size: int) -> AnyConditioner:
    """Set a larger vocabulary, and the id of the end token, which is no longer the last."""
    encoder = conditioner.encoders[name]
    if not isinstance(encoder, ClipTextEncoder):
        raise UserError(
            f"The text encoder {name!r} is of type {type(encoder).__name__}: expected a "
            "ClipTextEncoder to add words to; load the model without them."
        )
    model = encoder.model
    end_id = model.vocab_size - 1 if model.end_id is None else model.end_id
    model = dataclasses.replace(model, vocab_size=size, end_id=end_id)
    assert dataclasses.is_dataclass(conditioner)  # as all conditioners are
    return dataclasses.replace(conditioner, **{name: dataclasses.replace(encoder, model=model)})
