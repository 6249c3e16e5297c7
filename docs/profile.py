"""Plot docs/profile.png: a training step of `produce`, from a trace of this machine.

    pip install matplotlib && python docs/profile.py

The trace has the operations of XLA by name, the compiled program has the scope of each; together
they show how long each part of a step takes.
"""

import gzip
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt

from jaxdiff.benchmark import synthetic
from jaxdiff.distributed.mesh import make_mesh
from jaxdiff.training.loop import compile_step
from jaxdiff.training.profiler import traced
from jaxdiff.training.recipe import load_recipe

# The first scope that an operation's path has is its part.
PARTS = {
    "attention": "#d95f02",
    "text_encoder": "#7570b3",
    "autoencoder": "#66a61e",
    "block": "#1b9e77",
    "loss": "#e6ab02",
    "optimizer": "#e7298a",
    "ema": "#a6761d",
    "other": "#999999",
}
STEPS, WARM_UP = 100, 5


class Span(NamedTuple):
    """An operation, in milliseconds."""

    thread: int
    begin: float
    end: float
    part: str
    backward: bool


def trace_steps() -> tuple[list[dict[str, Any]], str]:
    """Train on a random batch; return the events of some steps, and the compiled program."""
    config = load_recipe("produce")
    mesh = make_mesh(config.mesh)
    state, shardings = synthetic.initial_state(config, mesh)
    frozen, batch = synthetic.random_frozen(config, mesh), synthetic.random_batch(config, mesh)
    jitted: Any = compile_step(config, mesh, shardings, jax.tree.map(lambda x: x.sharding, frozen))
    step = jitted.lower(state, frozen, batch).compile()
    for _ in range(WARM_UP):
        state, metrics = step(state, frozen, batch)
    jax.block_until_ready(metrics)
    with tempfile.TemporaryDirectory() as folder:
        with traced(folder):
            for i in range(STEPS):
                with jax.profiler.StepTraceAnnotation("train", step_num=i):
                    state, metrics = step(state, frozen, batch)
                    jax.block_until_ready(metrics)
        (path,) = Path(folder).glob("plugins/profile/*/*.trace.json.gz")
        return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"], step.as_text()


def scopes(program: str) -> dict[str, str]:
    """Return the path of scopes of each operation of a compiled program, by name."""
    found = re.findall(r'%?([\w.-]+) = .*?metadata=\{op_name="([^"]*)"', program)
    return dict(found)


def part_of(path: str) -> str:
    """Return the part of a step that a path of scopes belongs to."""
    names = set(re.split(r"[/()]", path))
    return next((part for part in PARTS if part in names), "other")


def innermost(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Leave out operations that contain others, such as loops."""
    by_thread = defaultdict(list)
    for event in events:
        by_thread[event["tid"]].append(event)
    for some in by_thread.values():
        some.sort(key=lambda event: (event["ts"], -event["dur"]))
        for event, following in zip(some, [*some[1:], None], strict=True):
            if following is None or following["ts"] >= event["ts"] + event["dur"]:
                yield event


def spans_of_step(events: list[dict[str, Any]], paths: dict[str, str]) -> list[Span]:
    """Return the operations of the fastest step, from 0 on."""
    step = min((e for e in events if e["name"] == "train"), key=lambda event: event["dur"])
    ends = step["ts"], step["ts"] + step["dur"]
    ops = [e for e in events if ends[0] <= e["ts"] <= ends[1] and e["name"] != "train"]
    begin = min(event["ts"] for event in ops)
    threads = {tid: i for i, tid in enumerate(dict.fromkeys(event["tid"] for event in ops))}
    spans = []
    for event in ops:
        path, since = paths.get(event["name"], ""), event["ts"] - begin
        thread, end = threads[event["tid"]], since + event["dur"]
        spans.append(Span(thread, since / 1e3, end / 1e3, part_of(path), "transpose(" in path))
    return spans


def fractions(events: list[dict[str, Any]], paths: dict[str, str]) -> dict[str, float]:
    """Return the fraction of each part, where other load on the machine slows no operation."""
    durations, totals = defaultdict(list), dict.fromkeys(PARTS, 0.0)
    for event in events:
        durations[event["name"]].append(event["dur"])
    for name, some in durations.items():
        totals[part_of(paths.get(name, ""))] += median(some) * len(some)
    whole = sum(totals.values())
    return {part: total / whole for part, total in totals.items()}


def plot(spans: list[Span], parts: dict[str, float]) -> None:
    """Plot the operations over time, and the fraction of each part."""
    figure, (line, bars) = plt.subplots(
        2, 1, figsize=(9.6, 4.2), layout="constrained", height_ratios=(3, 1)
    )
    for span in spans:
        width, color = span.end - span.begin, PARTS[span.part]
        line.barh(span.thread, width, left=span.begin, color=color)
    in_blocks = [span for span in spans if span.part == "block"]
    forward = min(span.begin for span in in_blocks if not span.backward)
    backward = min(span.begin for span in in_blocks if span.backward)
    update = max(span.end for span in in_blocks)
    top = max(span.thread for span in spans) + 0.5
    for begin, text in ((forward, "blocks"), (backward, "their gradients"), (update, "update")):
        line.axvline(begin, color="black", linewidth=0.8, linestyle=":")
        line.annotate(text, (begin, top), xytext=(3, 3), textcoords="offset points")
    line.set(ylabel="thread", yticks=range(int(top + 0.5)), xlabel="ms of one training step")
    left = 0.0
    for part, fraction in parts.items():
        print(f"{part}: {fraction:.1%}")
        if fraction < 0.005:
            continue
        bars.barh(0, fraction, left=left, color=PARTS[part], label=f"{part} {fraction:.0%}")
        left += fraction
    bars.set(xlim=(0, 1), yticks=[], xlabel="fraction of the time of all operations, by scope")
    bars.legend(ncols=len(parts), loc="upper center", bbox_to_anchor=(0.5, -0.9), frameon=False)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)


def main() -> None:
    """Trace, and plot."""
    events, program = trace_steps()
    steps = [event for event in events if event.get("name") == "train"]
    ops = list(innermost([event for event in events if "hlo_op" in event.get("args", {})]))
    paths = scopes(program)
    plot(spans_of_step([*steps, *ops], paths), fractions(ops, paths))


if __name__ == "__main__":
    main()
