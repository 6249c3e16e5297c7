"""Format plans as tables: one in full, or several side by side."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from jaxdiff.distributed.chips import GIB
from jaxdiff.planning.plan import ORIGINS, Plan


def plan_table(plan: Plan) -> Table:
    """Format all figures of one plan, with their origins."""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "1 device"
    table = Table(title=f"{plan.recipe} on {plan.topology}", title_justify="left")
    table.add_column("")
    table.add_column("figure")
    table.add_column("origin", style="dim")
    rows = [
        ("devices", f"{plan.chips} x {plan.chip}, {mesh}", ""),
        ("batch", _batch(plan), ""),
        ("parameters", f"{plan.parameters:,}, and {plan.frozen_parameters:,} frozen", "parameters"),
        ("FLOPs", _flops(plan), "flops_per_step"),
        *_memory_rows(plan),
        *_collective_rows(plan),
        *_time_rows(plan),
        ("compiled in", f"{plan.compile_s:.0f} s", "compile_s"),
        ("XLA flags", "\n".join(plan.flags) or "none", ""),
    ]
    for name, value, origin in rows:
        table.add_row(name, Text(value), ORIGINS.get(origin, ""))
    notes = []
    if plan.proxy_topology:
        notes.append(
            "XLA compiles for GPUs only on a machine with a GPU: its figures are estimates from "
            f"the program for {plan.proxy_topology}; give --topology local there."
        )
    if plan.quick:
        notes.append(
            "Compiled with --quick: memory is slightly too high; traffic and exposed collectives "
            "are unknown and not part of the step's time."
        )
    table.caption = "\n".join(notes) or None
    return table


def summary_table(plans: Sequence[Plan]) -> Table:
    """Format one line for each plan; values that all share are in the title."""
    rows = [_summary(plan) for plan in plans]
    shared = [name for name in rows[0] if len(rows) > 1 and len({row[name] for row in rows}) == 1]
    title = ", ".join(f"{name} {rows[0][name]}" for name in shared if rows[0][name])
    table = Table(title=title or None, title_justify="left")
    columns = [name for name in rows[0] if name not in shared]
    for name in columns:
        is_text = name in ("recipe", "topology", "mesh", "batch", "remat")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    return table


def _summary(plan: Plan) -> dict[str, str]:
    accumulate = f" / {plan.accumulate}" if plan.accumulate > 1 else ""
    return {
        "recipe": plan.recipe,
        "topology": plan.topology,
        "mesh": " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1),
        "batch": f"{plan.batch_size}{accumulate}",
        "remat": plan.remat or "",
        "memory/chip": f"{plan.memory_needed / GIB:.1f} GiB" + ("" if plan.fits else " (!)"),
        "of": f"{plan.memory_limit / GIB:.0f} GiB",
        "PFLOP/step": f"{plan.flops_per_step / 1e15:.3g}",
        "step": _seconds(plan.step_s),
        "exposed": _seconds(plan.exposed_s),
        "images/s": f"{plan.images_per_s:,.0f}",
        "days": f"{plan.days:.2f}",
        "compile": f"{plan.compile_s:.0f} s",
    }


def _batch(plan: Plan) -> str:
    parts = f" in {plan.accumulate} micro-batches" if plan.accumulate > 1 else ""
    remat = f"; remat {plan.remat}" if plan.remat else ""
    return f"{plan.batch_size} images{parts}, {plan.steps:,} steps{remat}"


def _flops(plan: Plan) -> str:
    return (
        f"{plan.flops_per_step:.3e} a step, {plan.flops_per_step / plan.chips:.3e} a chip, "
        f"{plan.flops_per_image:.3e} an image"
    )


def _memory_rows(plan: Plan) -> list[tuple[str, str, str]]:
    share = plan.memory_needed / plan.memory_limit
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    total = f"{_size(plan.memory_needed)} of {_size(plan.memory_limit)} ({share:.0%}): {verdict}"
    rows = [("memory per chip", total, "memory")]
    if plan.memory is not None:
        parts = plan.memory
        text = f"state {_size(parts.state)}, temporary {_size(parts.temporary)}, program "
        rows.append(("", text + _size(parts.program), "memory"))
    return rows


def _collective_rows(plan: Plan) -> list[tuple[str, str, str]]:
    if plan.memory is None:
        return []
    lines = [
        f"{e.count:,} x {e.kind} of {e.group}: {_size(e.payload)}, sends {_size(e.sent)}"
        for e in plan.collectives
    ]
    return [("collectives", "\n".join(lines) or "none", "collectives")]


def _time_rows(plan: Plan) -> list[tuple[str, str, str]]:
    if plan.step_s is None or plan.compute_s is None:
        return []
    parts = f"products {_seconds(plan.compute_s)}"
    if plan.memory_s is not None:
        parts += f", memory {_seconds(plan.memory_s)} ({_size(plan.traffic or 0)})"
    parts += f", interconnect {_seconds(plan.interconnect_s)}"
    if plan.network:
        parts += f", between slices {_seconds(plan.network_s)} ({_size(plan.network)})"
    if plan.exposed_s is not None:
        parts += f", {_seconds(plan.exposed_s)} exposed"
    text = f"{plan.images_per_s:,.0f} images/s, {plan.days:,.2f} days for the recipe"
    return [
        ("time of a step", f"{_seconds(plan.step_s)}: {parts}", "step_s"),
        (f"at {plan.utilisation:.0%} utilisation", text, "days"),
    ]


def _size(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
