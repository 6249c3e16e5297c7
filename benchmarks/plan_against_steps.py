"""Compare the planner's time of a training step with measured steps, in turns, on this machine.

    python -m benchmarks.plan_against_steps configs/produce.py --repeats 5

Each repeat measures a CPU's FLOP/s and bandwidth again, plans with them, and times three steps, so
that other load changes both sides. It prints the quotients of planned and measured time.
"""

import argparse
import time
from statistics import median
from typing import Any

import jax

from jaxdiff.benchmark import synthetic
from jaxdiff.distributed import chips
from jaxdiff.distributed.mesh import make_mesh
from jaxdiff.planning.hlo import read_program
from jaxdiff.planning.schedule import program_times
from jaxdiff.planning.topology import find_topology
from jaxdiff.training.loop import compile_step
from jaxdiff.training.recipe import load_recipe, with_remat


def main() -> None:
    """Compile the recipe's step for the devices here, then measure and plan it in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--remat", choices=("none", "dots", "full"))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    config = load_recipe(options.recipe)
    config = with_remat(config, options.remat) if options.remat else config
    mesh = make_mesh(config.mesh)
    state, shardings = synthetic.initial_state(config, mesh)
    frozen, batch = synthetic.random_frozen(config, mesh), synthetic.random_batch(config, mesh)
    jitted: Any = compile_step(config, mesh, shardings, jax.tree.map(lambda x: x.sharding, frozen))
    step = jitted.lower(state, frozen, batch).compile()
    program = read_program(step.as_text())
    quotients = []
    for _ in range(options.repeats):
        chips._measured_cpu_flops.cache_clear()
        chips._measured_cpu_bandwidth.cache_clear()
        topology = find_topology("local")
        planned = program_times(program, topology.chip, topology.links(mesh)).step
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            state, metrics = step(state, frozen, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
        quotients.append(planned / min(seconds[1:]))
        print(f"planned {planned * 1e3:.1f} ms, measured {min(seconds[1:]) * 1e3:.1f} ms")
    print(f"planned / measured: median {median(quotients):.2f} of {sorted(quotients)}")


if __name__ == "__main__":
    main()
