"""`jaxdiff sample`: generate images from prompts."""

from jaxdiff.cli.generate.command import SampleOptions, draw
from jaxdiff.cli.parsing import parse
from jaxdiff.distributed.distributed_init import join_hosts


def sample_command(arguments: list[str]) -> None:
    """Run `jaxdiff sample PROMPT ... [--model DIR] [--out DIR] ...`."""
    options = parse(SampleOptions, arguments, prog="jaxdiff sample")
    with join_hosts(options.hosts):
        draw(options)
