"""Recipes for slices compile there: reduced ones here, full ones with libtpu.

The latter take minutes each: JAXDIFF_NIGHTLY=1 enables them.
"""

import dataclasses
import math
from pathlib import Path

import jax
import pytest

from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.distributed.sharding import state_shardings
from jaxdiff.models.denoisers.dit import DiTConfig
from jaxdiff.models.denoisers.flux import FluxConfig
from jaxdiff.models.denoisers.z_image import ZImageConfig
from jaxdiff.planning.plan import make_plan
from jaxdiff.planning.topology import find_topology
from jaxdiff.training.abstract import abstract_batch, abstract_frozen, abstract_state
from jaxdiff.training.loop import compile_step
from jaxdiff.training.recipe import load_recipe, on_topology

RECIPES = {
    name: load_recipe(Path(__file__).parents[2] / "configs" / f"{name}.py")
    for name in (
        "dit_xl2_imagenet256",
        "dit_3b_512",
        "sd15_scratch_512",
        "sdxl_1024",
        "jit_pixel_256",
    )
}
FINE_TUNING = {
    name: load_recipe(Path(__file__).parents[2] / "configs" / f"{name}.py")
    for name in ("flux2_klein_4b", "flux2_klein_4b_lora", "z_image", "z_image_lora", "flux1_lora")
}
# Recipes whose images have enough tokens, or positions, for splash attention.
SPLASH = {"dit_3b_512", "sd15_scratch_512", "sdxl_1024", *FINE_TUNING}
# What is sold as v5e-256, v6e-256 and v5p-128, which counts two cores for each chip; eight GPUs.
SLICES = {"v5e:16x16": 256, "v6e:16x16": 256, "v5p:4x4x4": 64, "h100:8": 8}
CHIPS = {**SLICES, "v5e:8x8": 64, "v6e:8x8": 64}


@pytest.mark.parametrize("name", RECIPES)
def test_it_names_all_slices(name):
    assert {planned.topology for planned in RECIPES[name].slices} == {*SLICES}


@pytest.mark.parametrize("name", [*RECIPES, *FINE_TUNING])
def test_it_names_a_mesh_for_each_slice_that_its_batch_divides(name):
    config = RECIPES.get(name) or FINE_TUNING[name]
    assert config.slices
    for planned in config.slices:
        assert math.prod(vars(planned.mesh).values()) == CHIPS[planned.topology]
        on = on_topology(config, planned.topology)
        assert on.train.batch_size % (on.mesh.data * on.mesh.fsdp * on.train.accumulate) == 0


@pytest.mark.parametrize("topology", SLICES)
def test_its_mesh_lies_on_the_slice(topology):
    pytest.importorskip("libtpu")
    devices = find_topology(topology).devices
    for config in RECIPES.values():
        assert make_mesh(on_topology(config, topology).mesh, devices).size == SLICES[topology]


def small(config):
    """A recipe of the same, but small, parts; 1024 tokens or positions stay as many."""
    task, train = config.task, dataclasses.replace(config.train, batch_size=16, accumulate=1)
    config = dataclasses.replace(config, train=train, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    if isinstance(task.model.denoiser, FluxConfig | ZImageConfig):
        depth = (
            {"depth": 2}
            if isinstance(task.model.denoiser, ZImageConfig)
            else {"double_depth": 2, "single_depth": 2}
        )
        denoiser = dataclasses.replace(task.model.denoiser, heads=2, **depth)
        model = dataclasses.replace(task.model, denoiser=denoiser)
        return dataclasses.replace(config, task=dataclasses.replace(task, model=model))
    text = {"vocab_size": 600, "width": 32, "heads": 2, "depth": 1}
    conditioner = task.model.conditioner
    encoders = {
        name: dataclasses.replace(
            encoder, hidden_layer=None, model=dataclasses.replace(encoder.model, **text)
        )
        for name, encoder in conditioner.encoders.items()
    }
    conditioner = dataclasses.replace(conditioner, **encoders)
    denoiser = task.model.denoiser
    if isinstance(denoiser, DiTConfig):
        shape = {"width": 64, "depth": 2, "heads": 2, "text_width": 32}
        pooled = conditioner.pooled_width
        denoiser = dataclasses.replace(denoiser, pooled_width=pooled, **shape)
    else:
        shape = {"block_out_channels": (32, 32), "transformer_layers": (0, 2), "heads": (2, 2)}
        width = conditioner.text_width
        denoiser = dataclasses.replace(denoiser, cross_attention_dim=width, **shape)
    model = dataclasses.replace(task.model, denoiser=denoiser, conditioner=conditioner)
    return dataclasses.replace(config, task=dataclasses.replace(task, model=model))


@pytest.mark.parametrize("name", [*RECIPES, *FINE_TUNING])
def test_its_step_is_lowered_for_eight_tpus(name):
    """Up to the compiler: shapes, shardings, cached latents and the kernel of attention."""
    config = small(RECIPES.get(name) or FINE_TUNING[name])
    mesh = make_mesh(config.mesh, jax.devices()[:8])
    state, frozen = abstract_state(config), abstract_frozen(config)
    axes = config.task.param_axes()
    shardings = [state_shardings(tree, mesh, axes) for tree in (state, frozen)]
    step = compile_step(config, mesh, *shardings)
    traced = step.trace(state, frozen, abstract_batch(config))
    lowered = traced.lower(lowering_platforms=("tpu",))
    after, metrics = lowered.out_info
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert metrics["loss"].shape == ()
    assert ("tpu_custom_call" in lowered.as_text()) == (name in SPLASH)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "topology"),
    [
        (name, planned.topology)
        for name, config in (RECIPES | FINE_TUNING).items()
        for planned in config.slices
    ],
)
def test_it_fits_its_slices(name, topology):
    pytest.importorskip("libtpu")
    config = on_topology((RECIPES | FINE_TUNING)[name], topology)
    plan = make_plan(config, find_topology(topology), quick=True)
    assert plan.fits
    assert plan.collectives


@pytest.mark.nightly
def test_work_per_chip_is_the_same_on_more_chips():
    """Weak scaling: eight images a chip on 16, 256 and 512 chips; groups of 16 share weights."""
    pytest.importorskip("libtpu")
    config = on_topology(RECIPES["dit_xl2_imagenet256"], "v5e:16x16")
    plans = [
        make_plan(
            dataclasses.replace(
                config,
                mesh=MeshConfig(slices=slices, data=-1, fsdp=16),
                train=dataclasses.replace(config.train, batch_size=8 * chips),
            ),
            find_topology(name),
        )
        for name, slices, chips in (
            ("v5e:4x4", 1, 16),
            ("v5e:16x16", 1, 256),
            ("2xv5e:16x16", 2, 512),
        )
    ]
    few, many, two = plans
    assert few.flops_per_step / 16 == many.flops_per_step / 256 == two.flops_per_step / 512
    assert many.memory_needed == pytest.approx(few.memory_needed, rel=0.05)
    assert two.memory_needed == pytest.approx(many.memory_needed, rel=0.05)
    assert many.step_s < 1.05 * few.step_s
    assert two.step_s < 1.1 * many.step_s


@pytest.mark.nightly
def test_a_dit_xl2_is_planned_within_two_minutes():
    pytest.importorskip("libtpu")
    config = on_topology(RECIPES["dit_xl2_imagenet256"], "v5e:16x16")
    assert make_plan(config, find_topology("v5e:16x16")).compile_s < 120
