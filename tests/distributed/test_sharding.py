"""Specs follow from the names of axes, and a step gives the same result on any mesh."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jaxdiff.benchmark import synthetic
from jaxdiff.distributed.mesh import MeshConfig, batch_sharding, make_mesh
from jaxdiff.distributed.sharding import (
    gather_weights,
    partition_spec,
    replicated,
    split_tokens,
    state_shardings,
)
from jaxdiff.errors import UserError
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.autoencoders.tiny import TinyAutoencoderConfig
from jaxdiff.models.convolutions import Conv
from jaxdiff.models.denoisers.dit import DiTConfig
from jaxdiff.models.denoisers.flux import FluxConfig
from jaxdiff.models.denoisers.flux_blocks import Inputs, SharedModulation, SingleBlock
from jaxdiff.models.denoisers.unet_sd import GEGLU, UNet2DConditionConfig
from jaxdiff.models.denoisers.unet_small import UNetConfig
from jaxdiff.models.denoisers.z_image import ZImageConfig
from jaxdiff.models.layers import (
    FROM_MLP,
    TO_MLP,
    Dense,
    Modulation,
    UnitDense,
    abstract_params,
    any_rngs,
    bind_init,
    bind_params,
    init_params,
    param_axes,
    stack_blocks,
)
from jaxdiff.models.lora import Factors, LoraConfig, add_adapters
from jaxdiff.models.lora import tree as tree_of_adapters
from jaxdiff.models.quantized import quantize_kernel
from jaxdiff.models.text_encoders.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig
from jaxdiff.planning.collectives import exchanges
from jaxdiff.planning.hlo import read_program
from jaxdiff.planning.topology import find_topology
from jaxdiff.training.abstract import abstract_batch, abstract_state, check_axes
from jaxdiff.training.ema import Ema
from jaxdiff.training.loop import compile_step
from jaxdiff.training.optimizer import AdamW, Muon
from jaxdiff.training.step import init_state
from jaxdiff.training.tasks.autoencoder import AutoencoderTask
from jaxdiff.training.tasks.clip import ClipTask
from jaxdiff.training.tasks.diffusion import Pretrained, Trainable

TENSOR = MeshConfig(data=2, fsdp=2, tensor=2)
CONTEXT = MeshConfig(data=2, fsdp=2, context=2)
SLICES = MeshConfig(slices=2, data=2, fsdp=2)
# Adam divides by the root of squared gradients: where these are rounding errors, eps says so.
OPTIMIZER = AdamW(learning_rate=1e-2, eps=1e-4, clip_norm=None)

SMALL_FLUX: dict[str, Any] = {
    "channels": 3,
    "patch_size": 8,
    "heads": 2,
    "head_width": 32,
    "double_depth": 1,
    "single_depth": 1,
    "text_width": 16,
}
DENOISERS = {
    "dit": DiTConfig(patch_size=8, width=64, depth=1, heads=2, text_width=16, pooled_width=16),
    "unet": UNetConfig(
        widths=(32, 64), attention=(False, True), heads=2, text_width=16, pooled_width=16
    ),
    "unet_sd": UNet2DConditionConfig(
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        transformer_layers=(0, 1),
        heads=(2, 2),
        cross_attention_dim=16,
        norm_num_groups=8,
    ),
    "flux1": FluxConfig(
        **SMALL_FLUX,
        pooled_width=16,
        rope_axes=(8, 12, 12),
        mlp="gelu",
        bias=True,
        shared_modulation=False,
        fused=False,
        text_positions=False,
    ),
    "flux2": FluxConfig(**SMALL_FLUX, rope_axes=(8, 8, 8, 8)),
    "z_image": ZImageConfig(
        channels=3, heads=2, depth=1, refiner_depth=1, text_width=16, rope_axes=(8, 12, 12)
    ),
}
CLIP = ClipConfig(
    text=ClipTextConfig(vocab_size=600, length=16, width=16, depth=1, heads=2, projection_dim=8),
    vision=ClipVisionConfig(
        image_size=32, patch_size=8, width=16, depth=1, heads=2, projection_dim=8
    ),
)
AUTOENCODER = AutoencoderConfig(block_out_channels=(32, 64), norm_num_groups=8)


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        # Outputs of the first product split, inputs of the second: one exchange for the pair.
        (("layers", "embed", "heads"), (6, 256, 256), (None, "fsdp", "tensor")),
        (("layers", "heads", "embed"), (6, 256, 256), (None, "tensor", "fsdp")),
        (("layers", "mlp", "embed"), (6, 704, 256), (None, "tensor", "fsdp")),
        (("embed", "mlp"), (256, 1024), ("fsdp", "tensor")),
        # What tensor does not divide is free for fsdp.
        (("embed", "mlp"), (255, 1023), (None, None)),
        # Without a place on tensor, the longest axis is split over fsdp, the first of equals.
        (("embed", "embed"), (128, 512), (None, "fsdp")),
        (("vocab", "embed"), (1024, 128), ("fsdp", None)),
        (("window", "window", "channels", "channels"), (3, 3, 64, 64), (None, None, "fsdp", None)),
        # Axes without names are free.
        ((None, None), (512, 128), ("fsdp", None)),
        # The depth, a window and a rank are never split, however well they divide.
        (("layers", "embed", "embed"), (512, 64, 64), (None, "fsdp", None)),
        (("layers", None, None), (512, 64, 64), (None, "fsdp", None)),
        (("embed", "rank"), (63, 128), (None, None)),
        # Whole: vectors, stacked or not, what is small, and what no axis divides.
        (("layers", None), (6, 4096), ()),
        (("heads",), (4096,), ()),
        (("channels", "embed"), (48, 32), (None, None)),
        (("embed", "embed"), (91, 93), (None, None)),
    ],
)
def test_a_spec_follows_from_names_and_sizes(axes, shape, spec):
    assert partition_spec(axes, shape, make_mesh(TENSOR)) == PartitionSpec(*spec)


def test_a_name_without_a_rule_is_refused():
    with pytest.raises(UserError, match="axis is named 'emebd': expected one of 'heads'"):
        partition_spec(("emebd", "mlp"), (64, 64), make_mesh(TENSOR))


def flat(tree):
    return traverse_util.flatten_dict(tree)


def bound(config):
    return bind_init(type(config).build, config)


@pytest.mark.parametrize(
    "build",
    [
        *map(bound, DENOISERS.values()),
        bound(DiTConfig(text="joint", bottleneck=16)),
        bound(
            UNet2DConditionConfig(
                use_linear_projection=True, added_width=32, transformer_layers=(0, 1, 2, 1)
            )
        ),
        bind_init(Clip, CLIP),
        bound(AUTOENCODER),
        bound(TinyAutoencoderConfig()),
    ],
    ids=[*DENOISERS, "dit_joint", "unet_xl", "clip", "autoencoder", "tiny_autoencoder"],
)
def test_every_matrix_of_the_networks_here_names_its_axes(build):
    params, axes = flat(abstract_params(build)), flat(param_axes(build))
    assert params.keys() == axes.keys()
    for path, names in axes.items():
        assert len(names) == params[path].ndim, path
        if len([name for name in names if name != "layers"]) > 1:
            assert None not in names, path


def with_denoiser(config, name, **changes):
    model = dataclasses.replace(config.task.model, denoiser=DENOISERS[name])
    task = dataclasses.replace(config.task, model=model, **changes)
    return dataclasses.replace(config, task=task)


def specs_of(tree, axes, mesh):
    """Layouts by path, with nothing allocated."""
    shardings = jax.tree.leaves(state_shardings(tree, mesh, axes))
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return {path: sharding.spec for path, sharding in zip(paths, shardings, strict=True)}


def test_tensor_splits_attention_and_mlp_of_stable_diffusions_unet():
    build = bound(UNet2DConditionConfig())
    mesh = AbstractMesh((1, 1, 8, 1), ("data", "fsdp", "tensor", "context"))
    specs = specs_of(abstract_params(build), param_axes(build), mesh)
    places = {"q": 2, "k": 2, "v": 2, "out": 1, "inner": 2, "outer": 1}
    for path, spec in specs.items():
        layer = re.search(r"\['blocks'\]\['\w+'\]\['(\w+)'\]\['kernel'\]$", path)
        place = places.get(layer[1]) if layer else None
        assert [i for i, axis in enumerate(spec) if axis == "tensor"] == (
            [] if place is None else [place]
        ), path


def test_adapters_have_the_axes_of_their_layers(tiny_recipe):
    lora = LoraConfig(rank=8, targets=("q", "out", "conv1", "inner"))
    config = with_denoiser(
        tiny_recipe(),
        "unet_sd",
        trainable=Trainable(lora=lora, text_lora=LoraConfig(rank=8)),
        pretrained=Pretrained(denoiser="x", text_encoders="x"),
    )
    params, axes = abstract_state(config).params, flat(config.task.param_axes())
    for path, leaf in flat(params).items():
        assert len(axes[path]) == leaf.ndim
        assert leaf.shape[axes[path].index("rank")] == 8
    block = "adapters", "denoiser", "middle", "transformer", "blocks"
    assert axes[*block, "attention", "q", "lora", "up"] == ("layers", "rank", "heads")
    assert axes[*block, "attention", "out", "lora", "down"] == ("layers", "heads", "rank")


@pytest.mark.parametrize("optimizer", [AdamW(), Muon()], ids=["adamw", "muon"])
@pytest.mark.parametrize("name", DENOISERS)
def test_moments_and_average_have_the_layout_of_their_parameters(tiny_recipe, name, optimizer):
    config = dataclasses.replace(with_denoiser(tiny_recipe(), name), optimizer=optimizer)
    axes, state, mesh = config.task.param_axes(), abstract_state(config), make_mesh(TENSOR)
    specs = specs_of(state.params, axes, mesh)
    assert specs == specs_of(state.ema, axes, mesh)
    assert {axis for spec in specs.values() for axis in spec} == {None, "fsdp", "tensor"}
    found = []
    for path, spec in specs_of(state.opt_state, axes, mesh).items():
        owner = next((p for p in specs if path.endswith(p)), None)
        if owner is not None:
            assert spec == specs[owner], path
            found.append(owner)
    assert set(found) == set(specs)


class Unnamed(nnx.Module):
    """A network of someone who knows nothing of names."""

    def __init__(self):
        rngs = any_rngs()
        self.first = nnx.Linear(64, 256, rngs=rngs)
        self.blocks = stack_blocks(lambda rngs: nnx.Linear(64, 64, rngs=rngs), 512, rngs)


def test_a_network_without_names_is_sharded_over_fsdp():
    specs = specs_of(abstract_params(Unnamed), param_axes(Unnamed), make_mesh(TENSOR))
    assert specs["['first']['kernel']"] == PartitionSpec(None, "fsdp")
    assert specs["['blocks']['kernel']"] == PartitionSpec(None, "fsdp", None)
    assert specs["['blocks']['bias']"] == PartitionSpec()
    nothing = specs_of(abstract_params(Unnamed), {}, make_mesh(TENSOR))
    assert nothing["['first']['kernel']"] == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
    ("task", "mesh", "message"),
    [
        (None, MeshConfig(data=1, fsdp=8), None),
        (None, MeshConfig(data=1, tensor=8), None),
        (None, MeshConfig(data=2, context=4), None),
        (AutoencoderTask(model=AUTOENCODER), MeshConfig(fsdp=2), None),
        (ClipTask(model=CLIP), MeshConfig(tensor=2), None),
        (
            AutoencoderTask(model=AUTOENCODER),
            MeshConfig(tensor=2),
            "mesh.tensor 2 shards no parameter of this model: expected a divisor .* mesh.tensor to",
        ),
        (
            AutoencoderTask(
                model=AutoencoderConfig(block_out_channels=(10, 20), norm_num_groups=5)
            ),
            MeshConfig(data=1, fsdp=8),
            "mesh.fsdp 8 shards no parameter of this model: expected a divisor .* mesh.fsdp to 1",
        ),
        (AutoencoderTask(model=AUTOENCODER), MeshConfig(context=2), "mesh.context 2 splits no"),
        (ClipTask(model=CLIP), MeshConfig(context=4), "mesh.context 4 splits no activation"),
    ],
)
def test_an_axis_that_splits_nothing_is_refused(tiny_recipe, task, mesh, message):
    config = tiny_recipe()
    config = dataclasses.replace(config, task=task or with_denoiser(config, "dit").task)
    if message is None:
        check_axes(config, make_mesh(mesh))
    else:
        with pytest.raises(UserError, match=message):
            check_axes(config, make_mesh(mesh))


@functools.cache
def small(recipe, name):
    """A recipe with a small denoiser, and its state with weights away from zero."""
    config = with_denoiser(recipe(steps=10), name)
    config = dataclasses.replace(config, optimizer=OPTIMIZER, ema=Ema(decay=0.5))
    state = jax.jit(lambda: init_state(config.task, OPTIMIZER.build(10), config.ema, 0))()
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + 0.05 * rng.normal(size=p.shape).astype(p.dtype), state.params
    )
    return config, jax.device_get(dataclasses.replace(state, params=params))


def with_references(config):
    transforms = dataclasses.replace(config.data.transforms, references=2)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, transforms=transforms))


@functools.cache
def after_two_steps(recipe, name, mesh_config, accumulate=1):
    """State and metrics, as they lie on the mesh; None is a single device."""
    config, state = small(recipe, name.removesuffix(" references"))
    config = with_references(config) if name.endswith(" references") else config
    train = dataclasses.replace(config.train, accumulate=accumulate)
    config = dataclasses.replace(config, train=train)
    mesh = make_mesh(mesh_config or MeshConfig(), jax.devices()[: 8 if mesh_config else 1])
    shardings = state_shardings(abstract_state(config), mesh, config.task.param_axes())
    step = compile_step(config, mesh, shardings, {})
    batch = synthetic.random_batch(config, mesh)
    # Its key stays on the device, where a step would delete it.
    key = jax.random.clone(state.key)
    state = jax.device_put(state.replace(key=key), shardings)
    losses = []
    for _ in range(2):
        state, metrics = step(state, {}, batch)
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return state, losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh", "accumulate"),
    [
        *((name, CONTEXT, 1) for name in DENOISERS),
        *((name, TENSOR, 1) for name in ("dit", "flux2")),
        *(
            pytest.param(name, TENSOR, 1, marks=pytest.mark.nightly)
            for name in DENOISERS
            if name not in ("dit", "flux2")
        ),
        *((name, MeshConfig(data=2, fsdp=4), 1) for name in ("dit", "flux1", "flux2")),
        *(("flux2 references", mesh, 1) for mesh in (TENSOR, CONTEXT)),
        ("dit", MeshConfig(data=1, fsdp=8), 1),
        ("dit", None, 2),
        pytest.param("dit", None, 4, marks=pytest.mark.nightly),
        ("dit", MeshConfig(data=4, fsdp=2), 2),
        *(pytest.param("dit", mesh, 2, marks=pytest.mark.nightly) for mesh in (TENSOR, CONTEXT)),
        *(("dit", SLICES, accumulate) for accumulate in (1, 2)),
    ],
)
def test_devices_and_micro_batches_do_not_change_the_real_task(tiny_recipe, name, mesh, accumulate):
    one, losses = after_two_steps(tiny_recipe, name, None)
    eight, sharded_losses = after_two_steps(tiny_recipe, name, mesh, accumulate)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-4)
    assert losses[1] != losses[0]
    for field in ("params", "ema", "opt_state", "task_state"):
        # Adam makes rounding errors of gradients near zero a few percent of an update, 1e-2.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-4),
            getattr(eight, field),
            getattr(one, field),
        )


@pytest.mark.slow
def test_a_step_leaves_moments_where_their_parameters_are(tiny_recipe):
    state, _ = after_two_steps(tiny_recipe, "dit", TENSOR)
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(s))
    specs = jax.tree.map(lambda x: x.sharding.spec, state.params)
    for tree in (state.ema, adam.mu, adam.nu):
        assert jax.tree.map(lambda x: x.sharding.spec, tree) == specs
    kernel = adam.mu["denoiser"]["blocks"]["attention"]["q"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert {shard.data.nbytes for shard in kernel.addressable_shards} == {kernel.nbytes // 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "accumulate"),
    [
        ("dit", 1),
        ("dit", 4),
        ("unet", 1),
        *(
            pytest.param(name, 1, marks=pytest.mark.nightly)
            for name in ("unet_sd", "clip", "autoencoder")
        ),
    ],
)
def test_whole_gradients_are_not_reduced_over_all_devices(tiny_recipe, name, accumulate):
    """Only over `fsdp`, from which each device keeps its part, and this part over `data`, once."""
    config, mesh = tiny_recipe(), make_mesh(MeshConfig(data=2, fsdp=4))
    train = dataclasses.replace(config.train, batch_size=8 * accumulate, accumulate=accumulate)
    config = dataclasses.replace(config, train=train)
    if name in DENOISERS:
        config = with_denoiser(config, name)
        blocks = {"dit": {"depth": 2}, "unet_sd": {"transformer_layers": (0, 2)}}.get(name, {})
        denoiser = dataclasses.replace(config.task.model.denoiser, **blocks)
        model = dataclasses.replace(config.task.model, denoiser=denoiser)
        config = dataclasses.replace(config, task=dataclasses.replace(config.task, model=model))
    else:
        task = ClipTask(model=CLIP) if name == "clip" else AutoencoderTask(model=AUTOENCODER)
        config = dataclasses.replace(config, task=task)
    state, axes = abstract_state(config), config.task.param_axes()
    shardings = state_shardings(state, mesh, axes)
    step = compile_step(config, mesh, shardings, {})
    compiled = step.lower(state, {}, abstract_batch(config)).compile()
    sent = {2: 0.0, 4: 0.0, 8: 0.0}
    for exchange in exchanges(read_program(compiled.as_text())):
        if exchange.kind == "all-reduce":
            sent[exchange.group] += exchange.payload
    split, whole = 0, 0
    for leaf, sharding in zip(*map(jax.tree.leaves, (state.params, shardings.params)), strict=True):
        if sharding.spec and any(sharding.spec):
            split += 4 * leaf.size // 4
        else:
            whole += 4 * leaf.size
    # After micro-batches, most sums of vectors as well are only those of a replica.
    most = split + (whole if accumulate > 1 else 0)
    # XLA may gather the few vectors of a small kernel's gradient instead.
    assert 0.9 * split <= sent[2] <= 1.01 * most
    assert sent[8] <= whole + 2**13  # and scalars


def test_a_geglu_exchanges_weights_rather_than_activations():
    """And computes what one device computes."""

    def build() -> GEGLU:
        return GEGLU(32, any_rngs())

    params = init_params(lambda rngs: GEGLU(32, rngs), nnx.Rngs(0))
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    x = np.random.default_rng(0).normal(size=(8, 256, 32)).astype(np.float32)

    def on_mesh(params, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return bind_params(build, params)(x)

    placed = jax.device_put(params, state_shardings(params, mesh, param_axes(build)))
    compiled = jax.jit(on_mesh).lower(placed, jax.device_put(x, batch_sharding(mesh))).compile()
    out = compiled(placed, jax.device_put(x, batch_sharding(mesh)))
    np.testing.assert_allclose(
        out, bind_params(build, params)(jnp.asarray(x)), rtol=1e-4, atol=1e-4
    )
    exchanged = re.findall(
        r"f32\[([\d,]+)\]\S* (?:all-to-all|collective-permute|all-gather)\(", compiled.as_text()
    )
    sizes = [np.prod([int(side) for side in shape.split(",")]) for shape in exchanged]
    assert max(sizes, default=0) <= 32 * 8 * 32


def test_layers_of_units_with_adapters_and_biases_give_the_same_on_a_mesh():
    rng = np.random.default_rng(0)

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def build():
        first = UnitDense(32, 48, units=3, axes=TO_MLP, rngs=any_rngs())
        return nnx.Dict(
            first=first, second=UnitDense(48, 32, units=3, axes=FROM_MLP, rngs=any_rngs())
        )

    params = jax.tree.map(lambda leaf: random(*leaf.shape), abstract_params(build))
    adapters = {
        ("first",): Factors(random(32, 4), random(4, 48)),
        ("second",): Factors(random(48, 4), random(4, 32)),
    }

    def call(params, x):
        module = bind_params(build, params)
        add_adapters(module, tree_of_adapters(adapters))
        return module["second"].join(jax.nn.silu(module["first"].split(x)))

    mesh = make_mesh(MeshConfig(data=2, tensor=4))

    def on_mesh(params, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return call(params, x)

    x = random(8, 5, 32)
    placed = jax.device_put(params, state_shardings(params, mesh, param_axes(build)))
    found = jax.jit(on_mesh)(placed, jax.device_put(x, batch_sharding(mesh)))
    np.testing.assert_allclose(found, jax.jit(call)(params, x), rtol=1e-4, atol=1e-3)


def test_quantised_kernels_are_split_and_give_the_same_on_a_mesh():
    rng = np.random.default_rng(0)

    def build():
        first = Dense(32, 48, axes=TO_MLP, rngs=any_rngs())
        return nnx.Dict(first=first, second=Dense(48, 32, axes=FROM_MLP, rngs=any_rngs()))

    def call(params, x):
        module = bind_params(build, params)
        return module["second"](jax.nn.silu(module["first"](x)))

    mesh = make_mesh(MeshConfig(data=2, tensor=4))

    def on_mesh(params, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return call(params, x)

    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract_params(build)
    )
    for layer in params.values():
        layer["kernel"] = quantize_kernel(layer["kernel"], 2, "int8")
    shardings = state_shardings(params, mesh, param_axes(build))
    first, second = (shardings[name]["kernel"] for name in ("first", "second"))
    assert first.values.spec == first.scale.spec == PartitionSpec(None, "tensor")
    assert (second.values.spec, second.scale.spec) == (
        PartitionSpec("tensor", None),
        PartitionSpec(None, None),
    )
    x = rng.normal(size=(8, 32)).astype(np.float32)
    placed = jax.device_put(params, shardings)
    found = jax.jit(on_mesh)(placed, jax.device_put(x, batch_sharding(mesh)))
    np.testing.assert_allclose(found, jax.jit(call)(params, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["flux1", "flux2"])
def test_a_single_block_of_flux_exchanges_weights_rather_than_activations(name):
    """And computes what one device computes."""
    changes = {"heads": 4, "head_width": 8} | {"rope_axes": (2, 2, 2, 2)}
    config = dataclasses.replace(DENOISERS[name], **changes)
    width = config.width

    def build() -> SingleBlock:
        return SingleBlock(config, rngs=any_rngs())

    params = init_params(lambda rngs: SingleBlock(config, rngs=rngs), nnx.Rngs(0))
    vector = jnp.ones((8, width))
    vectors = SharedModulation(*(jnp.ones((8, n * width)) for n in (6, 6, 3)))
    x = np.random.default_rng(0).normal(size=(8, 256, width)).astype(np.float32)

    def call(params, x):
        shared = vectors if config.shared_modulation else None
        inputs = Inputs(x, x, vector, shared, jnp.ones((256, 4)), 16, 16)
        return bind_params(build, params)(x, inputs)

    mesh = make_mesh(MeshConfig(data=2, tensor=4))

    def on_mesh(params, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return call(params, x)

    placed = jax.device_put(params, state_shardings(params, mesh, param_axes(build)))
    split = jax.device_put(x, batch_sharding(mesh))
    compiled = jax.jit(on_mesh).lower(placed, split).compile()
    np.testing.assert_allclose(
        compiled(placed, split), jax.jit(call)(params, x), rtol=1e-4, atol=1e-4
    )
    exchanged = re.findall(
        r"f32\[([\d,]+)\]\S* (?:all-to-all|collective-permute|all-gather)\(", compiled.as_text()
    )
    sizes = [np.prod([int(side) for side in shape.split(",")]) for shape in exchanged]
    assert max(sizes, default=0) <= max(leaf.size for leaf in jax.tree.leaves(params))
    assert max(sizes, default=0) < 4 * 256 * width


@pytest.mark.parametrize(("images", "divides"), [(8, True), (6, False)])
def test_a_modulation_exchanges_vectors_rather_than_its_kernel(images, divides):
    """Where the images divide among the devices; and computes what one device computes."""

    def build() -> Modulation:
        return Modulation(64, 384, rngs=any_rngs())

    params = init_params(lambda rngs: Modulation(64, 384, rngs=rngs), nnx.Rngs(0))
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(images, 64)), jnp.float32)
    axes = param_axes(build)

    def loss(params, x):
        return jnp.sum(jnp.sin(bind_params(build, gather_weights(params, axes))(x)))

    def on_mesh(params, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    placed = state_shardings(params, mesh, axes)
    where = batch_sharding(mesh) if divides else replicated(mesh)
    step = jax.jit(on_mesh, out_shardings=(None, (placed, where)))
    inputs = jax.device_put(params, placed), jax.device_put(x, where)
    compiled = step.lower(*inputs).compile()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        compiled(*inputs),
        jax.value_and_grad(loss, argnums=(0, 1))(params, x),
    )
    if divides:
        payloads = [e.payload / e.count for e in exchanges(read_program(compiled.as_text()))]
        assert 0 < max(payloads) < 4 * 64 * 384 / 2


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=4)])
def test_a_tpu_reduce_scatters_gradients(mesh):
    """Also where `fsdp` alone splits the batch: XLA would pass partial sums around."""
    pytest.importorskip("libtpu")
    made = make_mesh(mesh, find_topology("v5e:2x4").devices)

    def loss(kernel, x):
        whole = gather_weights({"kernel": kernel}, {"kernel": ("embed", "mlp")})["kernel"]
        return jnp.sum((x @ whole).astype(jnp.float32) ** 2)

    def on_mesh(kernel, x):
        with jax.sharding.use_abstract_mesh(made.abstract_mesh):
            return jax.grad(loss)(kernel, x)

    where = NamedSharding(made, PartitionSpec("fsdp")), batch_sharding(made)
    inputs = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
        for shape, sharding in zip(((1024, 4096), (16384, 1024)), where, strict=True)
    )
    compiled = jax.jit(on_mesh, out_shardings=where[0]).lower(*inputs).compile()
    found = {e.kind: e for e in exchanges(read_program(compiled.as_text()))}
    assert found["reduce-scatter"].payload == 2 * 1024 * 4096
    assert "collective-permute" not in found


@pytest.mark.parametrize("spec", [(None, None, "fsdp", None), (None, None, None, "fsdp")])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_of_split_rows_is_that_of_one_device(spec, stride):
    def build() -> Conv:
        return Conv(64, 64, 3, stride, any_rngs())

    mesh = make_mesh(CONTEXT)
    params = init_params(lambda rngs: Conv(64, 64, 3, stride, rngs), nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 8, 64)), jnp.float32)

    def loss(params, x):
        return jnp.sum(jnp.sin(bind_params(build, params)(split_tokens(x))))

    def on_mesh(params, x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    kernel = NamedSharding(mesh, PartitionSpec(*spec))
    placed = {"kernel": kernel, "bias": NamedSharding(mesh, PartitionSpec())}
    split = jax.jit(on_mesh, out_shardings=(None, (placed, batch_sharding(mesh))))(
        jax.device_put(params, placed), jax.device_put(x, batch_sharding(mesh))
    )
    whole = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), split, whole)


def test_rows_of_an_image_are_split_over_context():
    """Each device has two images of four, and two of their eight rows."""
    mesh = make_mesh(MeshConfig(data=2, context=4))

    def split(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return split_tokens(x)

    x = jax.device_put(np.zeros((4, 8, 8, 3), np.float32), batch_sharding(mesh))
    assert {shard.data.shape for shard in jax.jit(split)(x).addressable_shards} == {(2, 2, 8, 3)}


def test_rows_that_cannot_be_split_are_refused():
    mesh = make_mesh(MeshConfig(data=2, context=4))
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        pytest.raises(UserError, match=r"mesh\.context 4 does not divide the 6 rows"),
    ):
        split_tokens(jnp.zeros((4, 6, 8, 3)))


def test_without_a_mesh_nothing_is_placed():
    x = jnp.zeros((4, 8, 8, 3))
    assert split_tokens(x) is x
    assert gather_weights({"q": x}, {})["q"] is x


def test_a_block_gathers_its_weights_but_for_what_tensor_splits():
    mesh = make_mesh(TENSOR)
    spec = PartitionSpec("fsdp", "tensor")
    kernel = jax.device_put(np.zeros((64, 64), np.float32), NamedSharding(mesh, spec))
    axes = {"q": {"kernel": ("embed", "heads")}, "modulation": {"kernel": ("embed", "embed")}}

    def gather(params):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gather_weights(params, axes)

    gathered = jax.jit(gather)({"q": {"kernel": kernel}, "modulation": {"kernel": kernel}})
    shapes = {
        name: leaf["kernel"].sharding.shard_shape((64, 64)) for name, leaf in gathered.items()
    }
    assert shapes == {"q": (64, 32), "modulation": (64, 64)}


def _is_adam(node) -> bool:
    return hasattr(node, "mu")
