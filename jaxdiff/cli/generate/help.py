"""The help of `jaxdiff sample`: one screen of common options, or all of them by group."""

import dataclasses
import textwrap
from collections.abc import Iterable

from jaxdiff.cli.generate.options import GROUPS, SampleOptions, setting_flags
from jaxdiff.config.fields import Field, fields_of

WIDTH = 80
_INDENT = 24  # of the texts

_USAGE = """usage: jaxdiff sample PROMPT ... [options]
       jaxdiff sample --prompts FILE [options]"""
_STATUS = """Exit status: 0 if all images were generated; 1 if rows of --prompts are invalid, or if
--again generates other pixels; 2 for a user error."""
_PLUGIN = """Like all commands, this one takes --plugin MODULE, a Python module that defines
types of your models."""


def help_text(*, everything: bool = False) -> str:
    """Return the help: the common options, or `everything` by group."""
    fields = [*fields_of(SampleOptions).values(), *setting_flags()]
    fields = [f for f in fields if f.name != "prompt"]
    if not everything:
        lines = _entries(
            (f for group in GROUPS for f in fields if f.doc.common and f.doc.group == group),
            short=True,
        )
        return "\n".join([_USAGE, *lines, "  --help-all".ljust(_INDENT) + "All options, by group."])
    parts = [_USAGE]
    for group in GROUPS:
        lines = _entries((f for f in fields if f.doc.group == group), short=False)
        parts.append("\n".join([f"{group}:", *lines]))
    return "\n\n".join([*parts, *(textwrap.fill(text, WIDTH) for text in (_PLUGIN, _STATUS))])


def _entries(fields: Iterable[Field], *, short: bool) -> list[str]:
    lines = []
    for f in fields:
        alias = f"{f.doc.alias}, " if f.doc.alias else ""
        heads = [f"  {alias}{f.flag} {f.metavar}".rstrip()]
        if dataclasses.is_dataclass(f.kind):
            heads = [f"  {f.flag}.{sub.name}" for sub in dataclasses.fields(f.kind)]
        text = textwrap.wrap(f.doc.summary if short else f.doc.text, WIDTH - _INDENT)
        if len(heads[-1]) + 2 > _INDENT:
            lines += heads
        else:
            lines += [*heads[:-1], heads[-1].ljust(_INDENT) + text.pop(0)]
        lines += [" " * _INDENT + line for line in text]
    return lines
