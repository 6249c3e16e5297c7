"""The scale of PEFT's adapters: alpha / rank, or as its config states it.

PEFT writes `adapter_config.json` beside its files, diffusers the same keys into a file's metadata.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxdiff.errors import UserError
from jaxdiff.pretrained.config_check import Fixed, check_config

Patterns = list[tuple[re.Pattern[str], float]]

_DEFAULT = 8  # of both r and lora_alpha

READ = {
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
}

_TRAINED_ON = "auto_mapping base_model_name_or_path inference_mode peft_version revision task_type"
_LAYERS = "exclude_modules layers_pattern layers_to_transform target_modules"  # as the tensors show
_INITIAL = "corda_config eva_config lora_ga_config loftq_config"  # initial values, then trained
_TRAINING = "ensure_weight_tying lora_dropout runtime_config velora_config"  # not in inference
_OTHER_LAYERS = "fan_in_fan_out megatron_core qalora_group_size"  # no effect on Linear and Conv2d

FIXED: Fixed = {
    **dict.fromkeys(f"{_TRAINED_ON} {_LAYERS} {_INITIAL} {_TRAINING} {_OTHER_LAYERS}".split()),
    "peft_type": ("LORA",),
    "bias": ("none",),
    # The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the model's own weights.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
}
"""Keys of PEFT's LoraConfig that are not read, with the supported values; None for any."""

_LARGEST_PATTERN = 300
_QUANTIFIERS = 4
_REPEATED_GROUP = re.compile(r"\)[*+{]")


class PeftConfig(NamedTuple):
    """What a config states of the adapters of one component.

    Attributes:
      what: the config, for messages.
      rank, alpha: of layers that no pattern matches.
      ranks, alphas: of layers by the first pattern that matches.
      rslora: the scale is alpha / sqrt(rank), instead of alpha / rank.
      dora: adapters have a magnitude.
      bias: adapters have a bias.
    """

    what: str
    rank: float
    alpha: float
    ranks: Patterns
    alphas: Patterns
    rslora: bool
    dora: bool
    bias: bool

    def scale(self, module: str, rank: int) -> float:
        """Return the factor on the output of an adapter.

        Args:
          module: the layer's name in the model that PEFT adapted.
          rank: of its tensors.

        Raises:
          UserError: the config states another rank.
        """
        stated = _matching(self.ranks, module, self.rank)
        if stated != rank:
            raise UserError(
                f"{self.what}: the rank of {module} is {stated:g}, but that of its tensors {rank}: "
                "expected the config of this file; copy both again."
            )
        alpha = _matching(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_peft_config(what: str, config: Any) -> PeftConfig:
    """Read a LoraConfig of PEFT; missing keys have its defaults.

    Raises:
      UserError: it is none, or asks for something that jaxdiff does not have.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"{what} is no config of PEFT: expected a JSON object; copy it again.")
    check_config(what, config, READ, FIXED)

    def flag(key: str) -> bool:
        value = config.get(key, False)
        if not isinstance(value, bool | None):
            raise UserError(f"{what}: {key} is {value!r}: expected true or false.")
        return bool(value)

    return PeftConfig(
        what,
        _number(what, "r", config.get("r", _DEFAULT)),
        _number(what, "lora_alpha", config.get("lora_alpha", _DEFAULT)),
        _patterns(what, "rank_pattern", config.get("rank_pattern")),
        _patterns(what, "alpha_pattern", config.get("alpha_pattern")),
        flag("use_rslora"),
        flag("use_dora"),
        flag("lora_bias"),
    )


def _number(what: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30:
        raise UserError(f"{what}: {key} is {str(value)[:40]!r}: expected a number.")
    return float(value)


def _patterns(what: str, key: str, stated: Any) -> Patterns:
    if not isinstance(stated, Mapping | None):
        raise UserError(f"{what}: {key} is {str(stated)[:40]!r}: expected a JSON object.")
    return [
        (_compiled(what, key, pattern), _number(what, f"{key}, {pattern!r}", value))
        for pattern, value in (stated or {}).items()
    ]


def _compiled(what: str, key: str, pattern: str) -> re.Pattern[str]:
    """Compile a pattern of PEFT, which matches whole ends of a layer's name.

    Patterns that could take a long time to match are refused.
    """
    quantifiers = sum(map(pattern.count, "*+{"))
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
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"{what}: the pattern {pattern[:40]!r} of {key} is no regular expression ({error}): "
            "correct it."
        ) from error


def _matching(patterns: Patterns, module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)
