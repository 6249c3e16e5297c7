"""The scale of PEFT's adapters: alpha / rank, or as its config states it.

PEFT writes `adapter_config.json` beside its files, diffusers the same keys into a file's metadata.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxdiff.errors import UserError
from jaxdiff.pretrained.config_check import (
    FLAG,
    Kind,
    Only,
    Schema,
    Unused,
    Used,
    number,
    read_keys,
)

Patterns = list[tuple[re.Pattern[str], float]]
Selects = Callable[[str], bool]

_DEFAULT = 8  # of both r and lora_alpha

_ANY = Kind("any", lambda value: value)  # read below, by what it is for
_NUMBER = number(-1e30, 1e30)

_REASONS = {
    "of the training": "auto_mapping base_model_name_or_path inference_mode peft_version revision "
    "task_type ensure_weight_tying lora_dropout runtime_config velora_config",
    "initial values, which were trained": "corda_config eva_config lora_ga_config loftq_config",
    "without effect on Linear and Conv2d": "fan_in_fan_out megatron_core qalora_group_size",
}

SCHEMA: Schema = {
    "r": Used(_DEFAULT, _NUMBER),
    "lora_alpha": Used(_DEFAULT, _NUMBER),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), Used(False, FLAG)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "target_modules"), Used(None, _ANY)),
    **dict.fromkeys(("exclude_modules", "layers_to_transform"), Used(None, _ANY)),
    "layers_pattern": Used(None, _ANY),
    **{key: Unused(why) for why, keys in _REASONS.items() for key in keys.split()},
    "peft_type": Only("LORA"),
    "bias": Only("none"),
    # The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the model's own weights.
    "init_lora_weights": Only(True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    **dict.fromkeys(("arrow_config", "kasa_config", "megatron_config"), Only(None)),
    **dict.fromkeys(("alora_invocation_tokens", "layer_replication"), Only(None, [])),
    **dict.fromkeys(("modules_to_save", "target_parameters"), Only(None, [])),
    "monteclora_config": Only(None),
    "trainable_token_indices": Only(None, [], {}),
    **dict.fromkeys(("use_bdlora", "use_qalora"), Only(None, False)),
}
"""Keys of PEFT's LoraConfig."""

_LARGEST_PATTERN = 300
_QUANTIFIERS = 4
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_ANY_LIST = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")
_DIGITS = re.compile(r"(\\d|\[0-9\])[*+]")  # whose runs are short in names of layers


class PeftConfig(NamedTuple):
    """What a config states of the adapters of one component.

    Attributes:
      what: the config, for messages.
      rank, alpha: of layers that no pattern matches.
      ranks, alphas: of layers by the first pattern that matches.
      rslora: the scale is alpha / sqrt(rank), instead of alpha / rank.
      dora: adapters have a magnitude.
      bias: adapters have a bias.
      selects: whether the config selects a layer; adapters of others have no effect in PEFT.
    """

    what: str
    rank: float
    alpha: float
    ranks: Patterns
    alphas: Patterns
    rslora: bool
    dora: bool
    bias: bool
    selects: Selects

    def scale(self, module: str, rank: int) -> float:
        """Return the factor on the output of an adapter.

        Args:
          module: the layer's name in the model that PEFT adapted.
          rank: of its tensors.

        Raises:
          UserError: the config states another rank, or leaves the layer out.
        """
        if not self.selects(module):
            raise UserError(
                f"{self.what}: target_modules, exclude_modules or layers_to_transform leave out "
                f"{module}, but the file has tensors for it: expected the config of this file; "
                "copy both again."
            )
        stated = _matching(self.ranks, module, self.rank)
        if stated != rank:
            raise UserError(
                f"{self.what}: the rank of {module} is {stated:g}, but that of its tensors {rank}: "
                "expected the config of this file; copy both again."
            )
        alpha = _matching(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_peft_config(what: str, config: Any, *, selects: bool = False) -> PeftConfig:
    """Read a LoraConfig of PEFT; missing keys have its defaults.

    Args:
      what: the config, for messages.
      config: the parsed JSON.
      selects: the config selects the layers, as in PEFT; in diffusers the tensors do.

    Raises:
      UserError: it is none, or asks for something that jaxdiff does not have.
    """
    values = read_keys(what, config, SCHEMA)
    return PeftConfig(
        what,
        values["r"],
        values["lora_alpha"],
        _patterns(what, "rank_pattern", values["rank_pattern"]),
        _patterns(what, "alpha_pattern", values["alpha_pattern"]),
        values["use_rslora"],
        values["use_dora"],
        values["lora_bias"],
        _selection(what, values) if selects else lambda module: True,
    )


def _selection(what: str, config: Mapping[str, Any]) -> Selects:
    """Return which layers the keys about them select."""

    def among(key: str) -> Selects | None:
        stated = config.get(key)
        if stated is None or stated == [] or stated == "all-linear":
            return None
        if isinstance(stated, str):
            pattern = _compiled(what, key, stated, "{}$")
            return lambda module: pattern.match(module) is not None
        if not isinstance(stated, list) or not all(isinstance(x, str) for x in stated):
            raise UserError(f"{what}: {key} is {str(stated)[:40]!r}: expected names of layers.")
        return lambda module: any(f".{module}".endswith(f".{x}") for x in stated)

    targets, excluded = among("target_modules"), among("exclude_modules")
    indices, stated = config.get("layers_to_transform"), config.get("layers_pattern") or []
    indices = [indices] if isinstance(indices, int) else indices or []
    stated = [stated] if isinstance(stated, str) else stated
    for key, values, kind in (
        ("layers_to_transform", indices, int),
        ("layers_pattern", stated, str),
    ):
        if not isinstance(values, list) or not all(isinstance(x, kind) for x in values):
            raise UserError(
                f"{what}: {key} is {str(values)[:40]!r}: expected a list of {kind.__name__}."
            )
    form = r"(?:^|.*?\.){}\.(?P<index>\d+)\."
    patterns = [_compiled(what, "layers_pattern", x, form) for x in stated] or [_ANY_LIST]

    def selects(module: str) -> bool:
        if (excluded and excluded(module)) or (targets and not targets(module)):
            return False
        if module in (config.get("target_modules") or ()):  # a whole name
            return True
        found = next(filter(None, (x.match(module) for x in patterns)), None)
        return not indices or (found is not None and int(found["index"]) in indices)

    return selects


def _number(what: str, key: str, value: Any) -> float:
    return read_keys(what, {key: value}, {key: Used(None, _NUMBER)})[key]


def _patterns(what: str, key: str, stated: Any) -> Patterns:
    if not isinstance(stated, Mapping | None):
        raise UserError(f"{what}: {key} is {str(stated)[:40]!r}: expected a JSON object.")
    return [
        (_compiled(what, key, pattern), _number(what, f"{key}, {pattern!r}", value))
        for pattern, value in (stated or {}).items()
    ]


def _compiled(what: str, key: str, pattern: str, form: str = r"(.*\.)?({})$") -> re.Pattern[str]:
    """Compile a pattern of PEFT, by default one of whole ends of a layer's name.

    Patterns that could take a long time to match are refused.
    """
    quantifiers = sum(map(_DIGITS.sub("", pattern).count, "*+{"))
    if (
        len(pattern) > _LARGEST_PATTERN
        or quantifiers > _QUANTIFIERS
        or _REPEATED_GROUP.search(pattern)
    ):
        raise UserError(
            f"{what}: the pattern {pattern[:40]!r} of {key} is too complicated: expected the name "
            f"of a layer, or at most {_QUANTIFIERS} of * and +, none after a group."
        )
    try:
        re.compile(pattern)
        return re.compile(form.replace("{}", f"(?:{pattern})"))
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"{what}: the pattern {pattern[:40]!r} of {key} is no regular expression ({error}): "
            "correct it."
        ) from error


def _matching(patterns: Patterns, module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)
