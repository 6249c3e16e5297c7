"""XLA's flags suit the kind of device, and each generation of TPU compiles a step with them."""

import dataclasses
from dataclasses import dataclass

import jax
import pytest

from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.distributed.xla_flags import (
    FUSE_ALL_GATHER,
    OVERLAP_GPU,
    OVERLAP_TPU,
    CompilerConfig,
    refused_flags_as_user_errors,
)
from jaxdiff.errors import UserError
from jaxdiff.planning.plan import make_plan
from jaxdiff.planning.topology import find_topology
from jaxdiff.training.recipe import from_json, to_json


@dataclass(frozen=True)
class Named:
    platform: str
    device_kind: str


V5E, V6E = Named("tpu", "TPU v5 lite"), Named("tpu", "TPU v6 lite")
H100, CPU = Named("gpu", "NVIDIA H100 80GB HBM3"), Named("cpu", "cpu")


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_each_generation_of_tpu_compiles_a_sharded_step(topology, tiny_recipe):
    pytest.importorskip("libtpu")
    mesh = MeshConfig(data=1, fsdp=-1)
    plan = make_plan(dataclasses.replace(tiny_recipe(), mesh=mesh), find_topology(topology))
    assert plan.fits
    assert "all-gather" in {exchange.kind for exchange in plan.collectives}
    assert plan.flags == CompilerConfig().flags(find_topology(topology).devices[0])


@pytest.mark.parametrize(
    ("device", "flags"),
    [
        (V5E, (*OVERLAP_TPU, FUSE_ALL_GATHER)),
        (Named("tpu", "TPU v5"), OVERLAP_TPU),
        (V6E, OVERLAP_TPU),
        (Named("tpu", "TPU v99"), OVERLAP_TPU),
        (H100, OVERLAP_GPU),
        (Named("cuda", "NVIDIA H100 80GB HBM3"), OVERLAP_GPU),
        (CPU, ()),
    ],
)
def test_the_default_flags_suit_the_kind_of_device(device, flags):
    assert CompilerConfig().flags(device) == flags


def test_xla_knows_the_default_flags_of_gpus():
    """Every backend parses them; the CPU's ignores them."""
    jax.jit(lambda x: x + 1, compiler_options=CompilerConfig().options(H100))(1.0)


def test_truth_values_are_passed_as_such():
    given = CompilerConfig(gpu=("xla_a=true", "xla_b=False", "xla_c=1")).options(H100)
    assert given == {"xla_a": True, "xla_b": False, "xla_c": "1"}


def test_given_flags_replace_the_defaults_of_their_platform():
    config = CompilerConfig(tpu=("xla_a=1", "xla_b=x=y"))
    assert config.options(V5E) == config.options(V6E) == {"xla_a": "1", "xla_b": "x=y"}
    assert config.flags(H100) == OVERLAP_GPU
    assert CompilerConfig(tpu=()).flags(V5E) == ()


@pytest.mark.parametrize("config", [CompilerConfig(), CompilerConfig(tpu=("xla_a=1",), gpu=())])
def test_flags_survive_json(config):
    assert from_json(CompilerConfig, to_json(config)) == config


@pytest.mark.parametrize("flag", ["--xla_a=1", "xla_a", "xla_a=", "a=1"])
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_flags_of_another_form_are_refused(platform, flag):
    with pytest.raises(UserError, match="expected xla_NAME=VALUE"):
        CompilerConfig(**{platform: (flag,)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"xla_there_is_none": "true"}, "knows no flag xla_there_is_none: expected"),
        ({"xla_backend_optimization_level": "x"}, "'x' is not a valid .* of xla_backend_opt"),
    ],
)
def test_a_flag_that_xla_refuses_is_a_user_error(options, message):
    step = jax.jit(lambda x: x + 1, compiler_options=options)
    with pytest.raises(UserError, match=message), refused_flags_as_user_errors():
        step(1.0)


def test_a_value_that_libtpu_refuses_is_a_user_error(tiny_recipe):
    pytest.importorskip("libtpu")
    flags = CompilerConfig(tpu=("xla_tpu_enable_latency_hiding_scheduler=perhaps",))
    config = dataclasses.replace(tiny_recipe(), compiler=flags)
    with pytest.raises(UserError, match="'perhaps' is not a valid value of xla_tpu_enable_lat"):
        make_plan(config, find_topology("v6e:2x2"))


def test_other_errors_of_xla_pass_unchanged():
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE"),
        refused_flags_as_user_errors(),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
