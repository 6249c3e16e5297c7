"""Every number of a recipe, a model or a command is checked by its annotation."""

import dataclasses
import math
import types
import typing

import numpy as np
import pytest

from jaxdiff.cli.bench import BenchOptions
from jaxdiff.cli.ema import EmaOptions
from jaxdiff.cli.evaluate import EvaluateOptions
from jaxdiff.cli.explore import ExploreOptions
from jaxdiff.cli.export import ExportOptions
from jaxdiff.cli.generate.options import SampleOptions
from jaxdiff.cli.plan import PlanOptions
from jaxdiff.cli.prepare import PrepareOptions, PreparePathOptions
from jaxdiff.cli.train import TrainOptions
from jaxdiff.config.checked import check_value, checked
from jaxdiff.config.fields import Count, Positive, Range
from jaxdiff.errors import FieldError, UserError
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.recipe import DATASETS

ROOTS = (
    BenchOptions,
    EmaOptions,
    EvaluateOptions,
    ExploreOptions,
    ExportOptions,
    PlanOptions,
    PrepareOptions,
    PreparePathOptions,
    SampleOptions,
    TrainOptions,
    *DATASETS,
)

HUGE = pytest.param(10**400, id="huge")


class Number(typing.NamedTuple):
    """A field that holds numbers.

    Attributes:
      cls: the dataclass.
      name: of the field.
      hint: its annotation.
      kind: int or float.
      shape: length of a tuple of them; None for one number.
      high: upper end of its range, if stated.
    """

    cls: type
    name: str
    hint: typing.Any
    kind: type
    shape: int | None
    high: float | None

    def value(self, number):
        return number if self.shape is None else (number,) * self.shape


def classes(kind, found):
    """All dataclasses of this package that an annotation reaches."""
    for inner in typing.get_args(kind):
        classes(inner, found)
    ours = isinstance(kind, type) and kind.__module__.startswith("jaxdiff.")
    if ours and dataclasses.is_dataclass(kind) and kind not in found:
        found[kind] = typing.get_type_hints(kind, include_extras=True)
        for f in dataclasses.fields(kind):
            classes(found[kind][f.name], found)
    return found


def leaves(hint, shape=None, high=None):
    """The numbers of an annotation: kind, shape and upper end."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in (int, float):
        yield hint, shape, high
    elif origin is typing.Annotated:
        ranges = [mark.high for mark in inner[1:] if isinstance(mark, Range)]
        yield from leaves(inner[0], shape, *ranges)
    elif origin in (typing.Union, types.UnionType):
        for candidate in inner:
            yield from leaves(candidate, shape, high)
    elif origin is tuple:
        count = 1 if inner[-1] is Ellipsis else len(inner)
        yield from leaves(inner[0], count, high)


def numbers():
    for root in ROOTS:
        for cls, hints in classes(root, {}).items():
            for f in dataclasses.fields(cls):
                for kind, shape, high in leaves(hints[f.name]):
                    if f.init:
                        yield Number(cls, f.name, hints[f.name], kind, shape, high)


NUMBERS = list({(n.cls, n.name): n for n in numbers()}.values())
FLOATS = [n for n in NUMBERS if n.kind is float]
INTS = [n for n in NUMBERS if n.kind is int]


def name(number):
    return f"{number.cls.__name__}.{number.name}" if isinstance(number, Number) else None


def test_the_walk_finds_numbers_of_all_kinds():
    found = {name(n) for n in NUMBERS}
    assert {"AdamW.learning_rate", "AdamW.clip_norm", "BenchOptions.peak_tflops"} <= found
    assert {"ExplicitGrid.times", "PlanOptions.most", "PrepareOptions.shards"} <= found
    assert {"GenerationSettings.guidance_scale", "Produce.length", "Guidance.interval"} <= found
    assert len(FLOATS) > 60
    assert len(INTS) > 100


@pytest.mark.parametrize("number", FLOATS, ids=name)
@pytest.mark.parametrize("value", [math.nan, -math.inf, "7x", True, HUGE, 1e39, 1j])
def test_a_number_is_finite(number, value):
    with pytest.raises(FieldError, match=rf"{number.cls.__name__}\.{number.name}\b"):
        number.cls(**{number.name: number.value(value)})


@pytest.mark.parametrize("number", FLOATS, ids=name)
def test_infinity_is_a_value_where_its_range_says_so(number):
    value = number.value(math.inf)
    if number.high == math.inf:
        assert check_value(number.name, value, number.hint) == value
    else:
        with pytest.raises(FieldError, match=rf"{number.cls.__name__}\.{number.name}\b.* is "):
            number.cls(**{number.name: value})


@pytest.mark.parametrize("number", INTS, ids=name)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1.5, "7x", True, HUGE])
def test_an_integer_is_whole(number, value):
    with pytest.raises(FieldError, match=rf"{number.cls.__name__}\.{number.name}\b"):
        number.cls(**{number.name: number.value(value)})


def test_an_infinite_norm_disables_clipping_but_no_learning_rate_is_infinite():
    assert AdamW(clip_norm=math.inf).clip_norm == math.inf
    with pytest.raises(UserError, match=r"AdamW\.learning_rate is inf: expected a positive"):
        AdamW(learning_rate=math.inf)


@pytest.mark.parametrize("value", [1.5, True, "1", 2**31, pytest.param(10**5000, id="long")])
def test_an_integer_is_within_32_bits(value):
    with pytest.raises(UserError, match="expected a whole number"):
        check_value("steps", value, int)


@pytest.mark.parametrize(
    ("value", "hint", "held"),
    [
        (np.float32(2), float, 2.0),
        (np.int64(3), int, 3),
        (3, Positive | None, 3.0),
        (None, Positive | None, None),
        (-0.0, float, 0.0),
        (np.bool_(True), bool, True),
        ([1, 2], tuple[Count, ...], (1, 2)),
        (np.array([1, 2]), tuple[int, int], (1, 2)),
    ],
)
def test_numbers_of_numpy_and_lists_are_held_as_python_has_them(value, hint, held):
    found = check_value("x", value, hint)
    assert (found, type(found)) == (held, type(held))
    if isinstance(found, float):
        assert math.copysign(1, found) == 1


@pytest.mark.parametrize("value", [0, -1.0, 1e-46, 1e-39, math.nan, "1", True])
def test_what_float32_rounds_to_an_excluded_end_is_excluded(value):
    with pytest.raises(UserError, match=r"^x is .*: expected a positive number\.$"):
        check_value("x", value, Positive | None)


def test_errors_of_several_lines_of_text_are_one_line():
    with pytest.raises(UserError) as error:
        check_value("x", np.array([[1.5, 2], [3, 4]]), float)
    assert "\n" not in str(error.value)


def test_a_checked_dataclass_is_checked_on_replacement_too():
    @checked
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Two:
        first: Count = 1
        second: Positive = 1.0

    two = Two(first=3)
    assert dataclasses.replace(two, second=2).second == 2.0
    with pytest.raises(
        FieldError, match=r"Two\.second is nan: expected a positive number"
    ) as error:
        dataclasses.replace(two, second=math.nan)
    assert str(error.value.called("--second")) == "--second is nan: expected a positive number."
