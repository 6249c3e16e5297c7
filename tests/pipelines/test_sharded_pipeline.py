"""A model sharded over the devices generates the images of a whole one."""

import jax
import numpy as np
import pytest

from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.errors import UserError
from jaxdiff.pipelines.input_images import InitImage
from jaxdiff.pipelines.inputs import Mix
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.sampling.guidance.autoguidance import Autoguidance
from jaxdiff.sampling.guidance.guidance import Guidance

PROMPTS, STEPS = ["a small red pea", "a green tomato with a stem", "a tomato"], [2, 3, 2]
ROUNDING = 1e-4  # of the range: sums of parts


def _bytes_per_device(params) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def whole(tiny_bundle):
    return Pipeline(tiny_bundle, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def expected(whole):
    return whole(PROMPTS, num_steps=STEPS, output="float")


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 4},
        {"data": 2, "fsdp": 2},
        {"fsdp": 2, "tensor": 2},
        {"data": 2, "tensor": 2},
        {"context": 4},
    ],
    ids=str,
)
def test_a_mesh_does_not_change_images(tiny_bundle, whole, expected, sizes):
    count = int(np.prod(list(sizes.values())))
    devices = jax.devices()[:count]
    sharded = Pipeline(tiny_bundle, devices=devices, mesh=MeshConfig(**sizes))
    images = sharded(PROMPTS, num_steps=STEPS, output="float", batch_size=2)
    np.testing.assert_allclose(images, expected, atol=ROUNDING)
    # Vectors and small matrices are whole on each device.
    held = _bytes_per_device(sharded.params) / _bytes_per_device(whole.params)
    assert held == 1 if sizes == {"context": 4} else held < 0.8


def test_editing_with_a_sharded_model(tiny_bundle, whole):
    sharded = Pipeline(tiny_bundle, devices=jax.devices()[:2], mesh=MeshConfig(fsdp=2))
    init = InitImage(image=whole("a pea"), strength=0.5)
    np.testing.assert_allclose(
        sharded("a tomato", init=init, output="float"),
        whole("a tomato", init=init, output="float"),
        atol=ROUNDING,
    )
    assert sharded.with_bundle(sharded.bundle).mesh == MeshConfig(fsdp=2)


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"data": 1, "fsdp": 2}], ids=str)
def test_a_mesh_that_does_not_fit_the_devices(tiny_bundle, sizes):
    with pytest.raises(UserError, match="does not fit the 4 devices"):
        Pipeline(tiny_bundle, devices=jax.devices()[:4], mesh=MeshConfig(**sizes))


def test_a_mesh_that_xla_cannot_partition(tiny_bundle):
    with pytest.raises(UserError, match="expected one of them to be 1"):
        Pipeline(tiny_bundle, mesh=MeshConfig(data=2, fsdp=2, context=2))


def test_a_mesh_that_splits_nothing(tiny_bundle):
    with pytest.raises(UserError, match=r"mesh.tensor 7 shards no parameter"):
        Pipeline(tiny_bundle, devices=jax.devices()[:7], mesh=MeshConfig(tensor=7))


def test_offloaded_text_encoders_do_not_change_images(tiny_bundle, whole):
    pipe = Pipeline(tiny_bundle, devices=jax.devices()[:2], offload_text=True)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(pipe.params["text_encoders"]))
    for prompts, arguments in (
        (PROMPTS, {"negative_prompt": [None, "a pea", ""], "seeds": [3, 4, 5]}),
        ("(red:1.4) pea", {}),
        ('"a pea":1 "a tomato":-0.5', {}),
        (Mix(a="a pea", b="a tomato", fraction=0.3), {}),
    ):
        images = pipe(prompts, output="float", **arguments)
        expected = whole(prompts, output="float", **arguments)
        np.testing.assert_allclose(images, expected, atol=ROUNDING, err_msg=str(prompts))
    assert pipe.with_bundle(pipe.bundle).offload_text


def test_new_prompts_compile_nothing_with_offloaded_text(tiny_bundle, compilations):
    pipe = Pipeline(tiny_bundle, devices=jax.devices()[:1], offload_text=True)
    pipe("a pea", batch_size=2)
    del compilations[:]
    pipe(["a tomato", "a red tomato", "a pea"], batch_size=2, seeds=[4, 5, 6])
    assert not compilations


def test_autoguidance_needs_the_text_encoders(tiny_bundle):
    pipe = Pipeline(tiny_bundle, devices=jax.devices()[:1], offload_text=True)
    with pytest.raises(UserError, match="leave one of the two out"):
        pipe("a pea", guidance=Guidance(guide=Autoguidance(model="shipped:produce", scale=2.0)))
