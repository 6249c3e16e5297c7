"""`jaxdiff sample`: generate images from prompts."""

from jaxdiff.cli.generate.command import sample_images
from jaxdiff.cli.generate.help import help_text
from jaxdiff.cli.generate.options import SampleFlags, from_flags
from jaxdiff.cli.parsing import parse_flags
from jaxdiff.distributed.distributed_init import join_hosts
from jaxdiff.io.terminal import write_text


def sample_command(arguments: list[str]) -> None:
    """Run `jaxdiff sample PROMPT ... [--model DIR] [--out DIR] ...`."""
    flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
    everything = "--help-all" in flags
    if everything or "--help" in flags or "-h" in flags:
        write_text(help_text(everything=everything))
        return
    options = from_flags(parse_flags(SampleFlags, arguments, prog="jaxdiff sample"))
    with join_hosts(options.hosts):
        sample_images(options)
