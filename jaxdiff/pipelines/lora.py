"""LoRA on a whole model: adapters beside its weights, as part of them, and off again.

`Adapters` go by part (`denoiser`, `text`, `text_2`), then by the path of the layer; the factor
alpha / rank on their output is part of `up`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.errors import UserError
from jaxdiff.models.lora import Factors, LoraConfig, Path, adapted, factors, merged, tree, without
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.training.tasks.diffusion import DiffusionTask

Adapters = Mapping[str, Mapping[Path, Factors]]


def scaled(adapters: Adapters, scale: float) -> dict[str, dict[Path, Factors]]:
    """Adapters that count `scale` times as much."""
    return {
        part: {path: Factors(pair.down, pair.up * scale) for path, pair in pairs.items()}
        for part, pairs in adapters.items()
    }


def adapters_of(bundle: Bundle) -> dict[str, dict[Path, Factors]]:
    """Those that a model has beside its weights; none is an empty dict."""
    found = {}
    for part, config in _configs(bundle).items():
        if config is not None:
            weights = bundle.params if _is_trained(bundle, part) else bundle.frozen
            found |= scaled({part: factors(weights[part])}, config.scale)
    return found


def merge(bundle: Bundle, adapters: Adapters) -> Bundle:
    """Makes adapters part of the weights, beside whatever others the model has."""
    weights = {"params": dict(bundle.params), "frozen": dict(bundle.frozen)}
    for part, pairs in adapters.items():
        home = weights[_home(bundle, part)]
        home[part] = merged(home[part], pairs)
    return bundle._replace(**weights)


def attach(bundle: Bundle, adapters: Adapters) -> Bundle:
    """Puts adapters beside the weights, and beside those that are there already.

    All adapters of a part get the rank of its greatest one, with zeros.
    """
    own, plain = adapters_of(bundle), detach(bundle)
    configs: dict[str, LoraConfig | None] = {}
    weights = {"params": dict(plain.params), "frozen": dict(plain.frozen)}
    for part in {**own, **adapters}:
        mine, new = own.get(part, {}), adapters.get(part, {})
        both = {path: mine[path].beside(new[path]) for path in mine.keys() & new.keys()}
        pairs = {**mine, **new, **both}
        rank = max(pair.down.shape[-1] for pair in pairs.values())
        targets = tuple(sorted(".".join(map(str, path)) for path in pairs))
        configs[part] = LoraConfig(rank=rank, targets=targets)
        home = weights[_home(plain, part)]
        dtype = jax.tree.leaves(home[part])[0].dtype
        leaves = tree({path: _padded(pair, rank, dtype) for path, pair in pairs.items()})
        if _is_trained(plain, part):  # they alone are, what they adapt is not
            weights["frozen"][part], home[part] = home[part], leaves
        else:
            home[part] = adapted(home[part], leaves)
    return _with_configs(plain, configs)._replace(**weights)


def detach(bundle: Bundle) -> Bundle:
    """The model without its adapters."""
    params, frozen = dict(bundle.params), dict(bundle.frozen)
    for part, config in _configs(bundle).items():
        if config is None:
            continue
        if _is_trained(bundle, part):
            params[part] = frozen.pop(part)
        else:
            frozen[part] = without(frozen[part])
    return _with_configs(bundle, {})._replace(params=params, frozen=frozen)


def _task(bundle: Bundle) -> DiffusionTask:
    task = bundle.config.task
    if not isinstance(task, DiffusionTask):
        raise UserError(
            f"{bundle.config.name} is a {type(task).__name__}, which has no adapters: give a "
            "text-to-image model."
        )
    return task


def _configs(bundle: Bundle) -> dict[str, LoraConfig | None]:
    task = _task(bundle)
    return {"denoiser": task.lora} | {name: tower.lora for name, tower in task.towers.items()}


def _with_configs(bundle: Bundle, configs: Mapping[str, LoraConfig | None]) -> Bundle:
    """The model whose recipe says that it has these adapters and no others."""
    task = _task(bundle)
    changes: dict[str, Any] = {
        name: dataclasses.replace(tower, lora=configs.get(name))
        for name, tower in task.towers.items()
    }
    pretrained = task.pretrained or bundle.config.name  # what the adapters are for
    for name, tower in changes.items():
        if tower.lora is not None and tower.trained:
            changes[name] = dataclasses.replace(tower, pretrained=tower.pretrained or pretrained)
    task = dataclasses.replace(task, lora=configs.get("denoiser"), pretrained=pretrained, **changes)
    return bundle._replace(config=dataclasses.replace(bundle.config, task=task))


def _is_trained(bundle: Bundle, part: str) -> bool:
    """Whether a part, or if it has adapters these, are trained."""
    return part == "denoiser" or _task(bundle).towers[part].trained


def _home(bundle: Bundle, part: str) -> str:
    """Where the weights of a part are, which its adapters are not always beside."""
    trained = _is_trained(bundle, part) and _configs(bundle)[part] is None
    return "params" if trained else "frozen"


def _padded(pair: Factors, rank: int, dtype: Any) -> Factors:
    down, up = (jnp.asarray(x, dtype) for x in pair)
    more = rank - down.shape[-1]
    at_end = [(0, 0)] * (down.ndim - 1)
    before_end = [*[(0, 0)] * (up.ndim - 2), (0, more), (0, 0)]
    return Factors(jnp.pad(down, [*at_end, (0, more)]), jnp.pad(up, before_end))
