"""Every number of a recipe, a model or a command is finite, by its annotation."""

import dataclasses
import math
import typing

import pytest

from jaxdiff.cli.evaluate import EvaluateOptions
from jaxdiff.cli.generate.options import SampleOptions
from jaxdiff.config.checked import check_value
from jaxdiff.errors import FieldError, UserError
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.recipe import Config


def classes(kind, found):
    """All dataclasses that an annotation reaches."""
    for inner in typing.get_args(kind):
        classes(inner, found)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind not in found:
        found[kind] = typing.get_type_hints(kind, include_extras=True)
        for f in dataclasses.fields(kind):
            classes(found[kind][f.name], found)
    return found


def floats():
    for root in (Config, SampleOptions, EvaluateOptions):
        for cls, hints in classes(root, {}).items():
            if cls.__module__.startswith("jaxdiff.") and hasattr(cls.__init__, "__wrapped__"):
                for f in dataclasses.fields(cls):
                    if float in typing.get_args(hints[f.name]) or hints[f.name] is float:
                        yield cls, f.name


@pytest.mark.parametrize(("cls", "name"), list(dict.fromkeys(floats())))
@pytest.mark.parametrize("value", [math.nan, -math.inf, "7", True, 10**400])
def test_a_number_is_finite(cls, name, value):
    with pytest.raises(FieldError, match=rf"{cls.__name__}\.{name}\b"):
        cls(**{name: value})


def test_infinity_is_a_value_where_its_range_says_so():
    assert AdamW(clip_norm=math.inf).clip_norm == math.inf
    with pytest.raises(UserError, match=r"AdamW\.learning_rate is inf: expected a positive"):
        AdamW(learning_rate=math.inf)


@pytest.mark.parametrize("value", [1.5, True, "1", 2**31, pytest.param(10**5000, id="long")])
def test_an_integer_is_whole_and_within_32_bits(value):
    with pytest.raises(UserError, match="expected a whole number"):
        check_value("steps", value, int)
