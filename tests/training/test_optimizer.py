import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.dit import DiT, DiTConfig
from jaxdiff.models.text_encoders.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig
from jaxdiff.training.optimizer import (
    AdamW,
    ConstantLR,
    CosineLR,
    Muon,
    WarmupStableDecay,
    decayed,
)


def run(optimizer: AdamW, params, gradients):
    """Parameters after one update for each of the gradients."""
    transform = optimizer.build(len(gradients))
    state = transform.init(params)
    for gradient in gradients:
        updates, state = transform.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_two_updates_agree_with_the_closed_form():
    optimizer = AdamW(learning_rate=0.1, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.5, clip_norm=None)
    p, gradients = np.float64(2.0), [0.3, -0.7]
    m = v = 0.0
    for n, g in enumerate(gradients, start=1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        p = p - 0.1 * (m / (1 - 0.8**n) / (np.sqrt(v / (1 - 0.9**n)) + 1e-3) + 0.5 * p)
    ended = run(
        optimizer, {"kernel": jnp.float32(2)}, [{"kernel": jnp.float32(g)} for g in gradients]
    )
    np.testing.assert_allclose(ended["kernel"], p, rtol=1e-6)


def test_only_gradients_with_a_larger_norm_are_clipped():
    # Adam is almost invariant to the scale of a gradient, except with a large eps.
    optimizer = AdamW(learning_rate=1.0, b1=0.0, b2=0.0, eps=1e6, weight_decay=0.0, clip_norm=1.0)
    params = {"a": jnp.zeros(()), "b": jnp.zeros(())}

    def moved(a, b):
        end = run(optimizer, params, [{"a": jnp.float32(a), "b": jnp.float32(b)}])
        return np.array([-1e6 * float(end["a"]), -1e6 * float(end["b"])])

    np.testing.assert_allclose(moved(30, 40), [0.6, 0.8], rtol=1e-4)
    np.testing.assert_allclose(moved(0.3, 0.4), [0.3, 0.4], rtol=1e-4)


def test_muon_orthogonalises_updates_and_scales_them_to_adams_rms():
    key, other = jax.random.split(jax.random.key(0))
    # Singular values from 1 to 100: a plain gradient step follows mostly the largest.
    u, v = (
        jnp.linalg.qr(jax.random.normal(key, (2, 12, 4)))[0],
        jnp.linalg.qr(jax.random.normal(other, (2, 4, 4)))[0],
    )
    gradient = jnp.einsum("bik,k,bjk->bij", u, jnp.array([100.0, 10, 3, 1]), v)
    optimizer = Muon(learning_rate=0.5, weight_decay=0.0, clip_norm=None)
    shapes = {"linear": gradient[0], "stacked": gradient, "conv": gradient[0].reshape(2, 2, 3, 4)}
    params = {name: {"kernel": jnp.zeros(g.shape)} for name, g in shapes.items()}
    ended = run(optimizer, params, [{name: {"kernel": g} for name, g in shapes.items()}])
    step = -ended["stacked"]["kernel"] / (0.5 * 0.2 * 12**0.5)
    values = jnp.linalg.svd(step, compute_uv=False)
    assert values.min() > 0.6  # what five iterations leave
    assert values.max() < 1.3
    aligned = jnp.einsum("bik,bij,bjk->bk", u, step, v)
    np.testing.assert_allclose(aligned, jnp.ones((2, 4)), atol=0.4)
    np.testing.assert_allclose(ended["linear"]["kernel"], ended["stacked"]["kernel"][0], atol=1e-5)
    np.testing.assert_allclose(
        ended["conv"]["kernel"].reshape(12, 4), ended["linear"]["kernel"], atol=1e-5
    )


def test_muon_leaves_all_but_kernels_to_nadam_and_decays_kernels_as_adamw_does():
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    gradients = [{"kernel": jnp.zeros((3, 2)), "bias": jnp.array([0.3, -2.0])}] * 3
    settings = {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "weight_decay": 0.5, "clip_norm": None}
    ours = run(Muon(**settings), params, gradients)
    decayed_alone = run(AdamW(**settings), params, gradients)["kernel"]
    np.testing.assert_allclose(ours["kernel"], decayed_alone, rtol=1e-5)
    nadam = optax.nadam(0.1, b1=0.8, b2=0.9)
    state = nadam.init(params["bias"])
    bias = params["bias"]
    for gradient in gradients:
        updates, state = nadam.update(gradient["bias"], state)
        bias = optax.apply_updates(bias, updates)
    np.testing.assert_allclose(ours["bias"], bias, rtol=1e-5)


def names(tree, wanted: bool) -> set[str]:
    """Last names in the paths of the leaves that equal `wanted`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value").split("/")[-1]
        for path, leaf in leaves
        if leaf is wanted
    }


def clip():
    sizes = dict(width=8, depth=2, heads=2, projection_dim=4)
    return Clip(
        ClipConfig(
            text=ClipTextConfig(vocab_size=16, length=4, **sizes),
            vision=ClipVisionConfig(image_size=8, patch_size=4, **sizes),
        ),
        rngs=nnx.Rngs(0),
    )


def dit():
    config = DiTConfig(
        width=16, depth=2, heads=2, text_width=8, pooled_width=8, patch_size=2, bottleneck=4
    )
    return DiT(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("pure", [False, True], ids=["nnx_state", "pure_dict"])
@pytest.mark.parametrize(
    ("make", "spared"),
    [
        (dit, {"bias", "scale"}),
        (clip, {"bias", "scale", "position_embedding", "class_embedding", "logit_scale"}),
    ],
    ids=["dit", "clip"],
)
def test_only_kernels_decay_even_in_stacked_blocks(make, spared, pure):
    state = nnx.state(nnx.eval_shape(make), nnx.Param)
    mask = decayed(nnx.to_pure_dict(state) if pure else state)
    assert names(mask, True) == {"kernel"}
    assert names(mask, False) >= spared
    assert "kernel" not in names(mask, False)


def test_weight_decay_shrinks_kernels_and_nothing_else():
    params = {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3)), "scale": jnp.ones(3)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    ended = run(AdamW(learning_rate=0.1, weight_decay=0.5), params, [zeros])
    np.testing.assert_allclose(ended["kernel"], 0.95, rtol=1e-6)
    np.testing.assert_array_equal(ended["bias"], 1)
    np.testing.assert_array_equal(ended["scale"], 1)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ConstantLR(), {0: 1, 99: 1}),
        (ConstantLR(warmup_steps=10), {0: 0.1, 4: 0.5, 9: 1, 10: 1, 99: 1}),
        (CosineLR(warmup_steps=20), {0: 0.05, 19: 1, 20: 1, 60: 0.5, 100: 0, 120: 0}),
        (CosineLR(warmup_steps=0, final=0.1), {0: 1, 50: 0.55, 100: 0.1}),
        (
            WarmupStableDecay(warmup_steps=10, decay_fraction=0.4, decay="linear", final=0.2),
            {4: 0.5, 10: 1, 60: 1, 80: 0.6, 100: 0.2},
        ),
        (
            WarmupStableDecay(warmup_steps=10, decay_fraction=0.4, decay="sqrt"),
            {4: 0.5, 60: 1, 70: 0.5, 100: 0},
        ),
    ],
)
def test_schedules_pass_through_known_values(schedule, expected):
    optimizer = AdamW(learning_rate=3.0, schedule=schedule)
    rate = jax.jit(lambda step: optimizer.learning_rate_at(step, 100))
    for step, factor in expected.items():
        np.testing.assert_allclose(rate(step), 3 * factor, atol=1e-6)
        np.testing.assert_allclose(optimizer.learning_rate_at(step, 100), 3 * factor, atol=1e-6)


def test_the_update_uses_the_learning_rate_that_is_reported():
    optimizer = AdamW(
        learning_rate=0.1, b1=0.0, b2=0.0, weight_decay=0.0, schedule=ConstantLR(warmup_steps=4)
    )
    ended = run(optimizer, {"kernel": jnp.zeros(())}, [{"kernel": jnp.float32(0.5)}] * 3)
    rates = [float(optimizer.learning_rate_at(step, 3)) for step in range(3)]
    # Without moving averages, Adam's step is the learning rate times the sign.
    np.testing.assert_allclose(ended["kernel"], -sum(rates), rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdamW(learning_rate=0.0),
        lambda: AdamW(b2=1.0),
        lambda: AdamW(clip_norm=0.0),
        lambda: Muon(momentum=1.0),
        lambda: CosineLR(final=1.5),
        lambda: WarmupStableDecay(decay_fraction=2.0),
        lambda: ConstantLR(warmup_steps=-1),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(UserError, match=": expected"):
        make()
