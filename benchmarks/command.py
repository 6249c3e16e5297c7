"""The command line that the comparisons of a recipe share: that of `jaxdiff bench`."""

import sys
from collections.abc import Callable, Sequence

from jaxdiff.benchmark.report import Measurement
from jaxdiff.cli.bench import TimingOptions, measure_and_report
from jaxdiff.cli.parsing import parse_flags
from jaxdiff.cli.recipe_flags import read_recipe
from jaxdiff.errors import UserError


def run(
    kind: str,
    measure: Callable[..., list[Measurement]],
    arguments: Sequence[str] | None = None,
) -> int:
    """Time `[RECIPE] [--key value ...]` and print a report; return the exit status.

    Args:
      kind: name of the benchmark in the report.
      measure: called as `measure(config, warmup=, repeats=)`.
      arguments: of the command line; those of the process by default.
    """
    try:
        config, rest = read_recipe(list(sys.argv[1:] if arguments is None else arguments))
        options = parse_flags(TimingOptions, rest, prog=kind, default=TimingOptions(config=config))
        measure_and_report(kind, options, measure)
    except UserError as error:
        print(f"{kind}: {error}", file=sys.stderr)
        return 2
    return 0
