"""XLA's flags suit the kind of device, and each generation of TPU compiles a step with them."""

import dataclasses
from dataclasses import dataclass

import jax
import pytest

from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.distributed.xla_flags import (
    FUSE_ALL_GATHER,
    OVERLAP_GPU,
    OVERLAP_TPU,
    CompilerConfig,
    as_options,
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


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_each_generation_of_tpu_compiles_a_sharded_step(topology, tiny_recipe):
    pytest.importorskip("libtpu")
    mesh = MeshConfig(data=-1, fsdp=4)
    plan = make_plan(dataclasses.replace(tiny_recipe(), mesh=mesh), find_topology(topology))
    assert plan.fits
    assert plan.collectives  # all-gathers, except on 7x: it sums weights as small as these
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
    jax.jit(lambda x: x + 1, compiler_options=as_options(CompilerConfig().flags(H100)))(1.0)


def test_truth_values_are_passed_as_such():
    given = as_options(("xla_a=true", "xla_b=False", "xla_c=1", "xla_d=x=y"))
    assert given == {"xla_a": True, "xla_b": False, "xla_c": "1", "xla_d": "x=y"}


def test_given_flags_replace_the_defaults_of_their_platform():
    config = CompilerConfig(tpu=("xla_a=1", "xla_b=x=y"))
    assert config.flags(V5E) == config.flags(V6E) == ("xla_a=1", "xla_b=x=y")
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


@pytest.fixture
def as_gpu(monkeypatch):
    """`as_gpu(*flags)`: the flags that this machine's compiler knows, as if it had a GPU."""
    monkeypatch.setattr(CompilerConfig, "flags", lambda self, _: self.gpu)
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    return lambda *flags: CompilerConfig(gpu=flags).known_flags(mesh)


def test_a_flag_that_xla_does_not_know_is_reported_and_left_out(as_gpu, caplog):
    known = "xla_backend_optimization_level=1"
    assert as_gpu("xla_there_is_none=true", known, "xla_nor_this=1") == (known,)
    assert [record.message for record in caplog.records] == [
        f"compiler: this version of XLA knows no flag {name}: compiling without it."
        for name in ("xla_there_is_none", "xla_nor_this")
    ]


def test_a_value_that_xla_refuses_is_a_user_error(as_gpu):
    with pytest.raises(UserError, match=r"'x' is not a valid .* of xla_backend_opt"):
        as_gpu("xla_backend_optimization_level=x")


def test_a_plan_for_a_tpu_leaves_out_what_libtpu_does_not_know(tiny_recipe, caplog):
    pytest.importorskip("libtpu")
    flags = ("xla_tpu_there_is_none=1", *OVERLAP_TPU)
    config = dataclasses.replace(tiny_recipe(), compiler=CompilerConfig(tpu=flags))
    assert make_plan(config, find_topology("v6e:2x2")).flags == OVERLAP_TPU
    assert "knows no flag xla_tpu_there_is_none: compiling without it" in caplog.text


def test_a_value_that_libtpu_refuses_is_a_user_error(tiny_recipe):
    pytest.importorskip("libtpu")
    flags = CompilerConfig(tpu=("xla_tpu_enable_latency_hiding_scheduler=perhaps",))
    config = dataclasses.replace(tiny_recipe(), compiler=flags)
    with pytest.raises(UserError, match="'perhaps' is not a valid value of xla_tpu_enable_lat"):
        make_plan(config, find_topology("v6e:2x2"))


def test_other_errors_of_xla_pass_unchanged(as_gpu, monkeypatch):
    def fail(*_args, **_kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(jax, "jit", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE"):
        as_gpu("xla_gpu_only_here=1")
