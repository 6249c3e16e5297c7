import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from jaxdiff.errors import UserError
from jaxdiff.models.layers import any_rngs
from jaxdiff.models.text_encoders.clip import (
    CLIP_MEAN,
    CLIP_STD,
    MAX_LOGIT_SCALE,
    Clip,
    ClipConfig,
    ClipText,
    ClipTextConfig,
    ClipVision,
    ClipVisionConfig,
    normalize_for_clip,
)

END = 9
IDS = jnp.array([[1, 4, 2, END, 0, 0], [1, 7, END, 0, 0, 0], [1, 3, 5, 6, 2, END]])
ENDS = jnp.array([3, 2, 5])


def text_config(**changes) -> ClipTextConfig:
    sizes = {"vocab_size": 12, "length": 8, "width": 16, "depth": 3, "heads": 2, "end_id": END}
    return ClipTextConfig(**(sizes | changes))


def vision_config(**changes) -> ClipVisionConfig:
    sizes = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 3, "heads": 2}
    return ClipVisionConfig(**(sizes | changes))


@functools.cache
def split(network, config) -> tuple[nnx.GraphDef, nnx.State]:
    """The graph and the parameters, made by one compiled program: quicker than one for each."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: network(config, rngs=any_rngs())))
    return graphdef, jax.jit(lambda: nnx.state(network(config, rngs=nnx.Rngs(0))))()


def text(**changes) -> ClipText:
    return nnx.merge(*split(ClipText, text_config(**changes)))


def vision() -> ClipVision:
    return nnx.merge(*split(ClipVision, vision_config()))


def split_clip() -> tuple[nnx.GraphDef, nnx.State]:
    configs = {"text": text_config(projection_dim=8), "vision": vision_config(projection_dim=8)}
    return split(Clip, ClipConfig(**configs))


def images(count: int = 3) -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (count, 16, 16, 3), minval=-1, maxval=1)


def products(jaxpr) -> list:
    """Every matrix product and convolution of a program, inner ones included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append(equation)
        for inner in jaxprs_in_params(equation.params):
            found += products(inner)
    return found


def test_text_features_have_the_shapes_and_the_mask_includes_the_end_token():
    features = jax.jit(text(projection_dim=5))(IDS)
    assert features.tokens.shape == (3, 6, 16)
    assert features.pooled.shape == (3, 5)
    np.testing.assert_array_equal(features.mask, jnp.arange(6) <= ENDS[:, None])


@pytest.mark.parametrize("end_id", [END, None])
def test_pooled_is_the_normalised_state_at_the_end_token(end_id):
    features = jax.jit(text(end_id=end_id))(IDS)
    np.testing.assert_array_equal(features.pooled, features.tokens[jnp.arange(3), ENDS])


def test_the_end_is_the_first_end_id_though_padding_repeats_it_and_larger_ids_exist():
    ids = jnp.array([[1, 11, END, END, END, END]])
    assert jax.jit(lambda ids: text()(ids).mask)(ids).sum() == 3


def test_a_prompt_without_an_end_token_is_read_whole_and_pooled_at_its_start():
    # as transformers' CLIPTextModel pools it
    ids = jnp.array([[1, 4, 2, 3, 5, 6]])
    features = jax.jit(text())(ids)
    assert features.mask.all()
    np.testing.assert_array_equal(features.pooled[0], features.tokens[0, 0])


def test_a_token_sees_itself_and_what_precedes_it_alone():
    graphdef, params = split(ClipText, text_config())

    def tokens(positions):
        model = nnx.merge(graphdef, params)
        model.position_embedding = nnx.Param(positions)
        return model(IDS[:1]).tokens[0, :, 0]

    jacobian = jax.jit(jax.jacobian(tokens))(params["position_embedding"][...])
    reaches = jnp.abs(jacobian).sum(axis=-1)[:, :6] > 0  # [token, position]
    np.testing.assert_array_equal(reaches, jnp.tril(jnp.ones((6, 6), bool)))


def test_hidden_states_are_counted_from_the_embeddings_to_the_last_block():
    @jax.jit
    def states(ids):
        model = text()
        raw = {layer: model(ids, hidden_layer=layer, final_norm=False) for layer in range(-4, 4)}
        normed = [model(ids, hidden_layer=layer).tokens for layer in (None, -1, 2)]
        expected = [model.final_norm(raw[layer].tokens) for layer in (-1, -1, 2)]
        return raw, normed, expected, model.token_embedding[ids] + model.position_embedding[:6]

    raw, normed, expected, embeddings = states(IDS)
    np.testing.assert_allclose(raw[0].tokens, embeddings, atol=1e-6)
    for layer in range(4):
        np.testing.assert_allclose(raw[layer].tokens, raw[layer - 4].tokens, atol=1e-6)
        # pooled never depends on the layer that the tokens are read from
        np.testing.assert_allclose(raw[layer].pooled, raw[3].pooled, atol=1e-6)
        assert layer == 0 or not np.allclose(raw[layer].tokens, raw[layer - 1].tokens)
    np.testing.assert_allclose(normed, expected, atol=1e-6)


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(UserError, match=f"no hidden layer {layer}.*-4 to 3"):
        text()(IDS, hidden_layer=layer)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_scan_equals_the_blocks_one_by_one(activation):
    model = text(activation=activation)
    graphdef, params = nnx.split(model.blocks)
    one = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, causal=True))
    x, scanned = jax.jit(
        lambda ids: [model(ids, hidden_layer=layer, final_norm=False).tokens for layer in (0, None)]
    )(IDS)
    for i in range(3):
        x = one(jax.tree.map(lambda p, i=i: p[i], params), x)
    np.testing.assert_allclose(scanned, x, atol=1e-6)


def test_layers_start_different():
    kernel = text().blocks.mlp_in.kernel[...]
    assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
    def gradient(remat):
        graphdef, params = split(ClipText, text_config(remat=remat))
        loss = jax.jit(jax.grad(lambda p: (nnx.merge(graphdef, p)(IDS).pooled ** 3).sum()))
        return loss(params)

    def same(a, b):  # as a whole: what is added up is far larger than some of the sums
        assert np.linalg.norm(a - b) <= 1e-5 + 1e-6 * np.linalg.norm(b)

    jax.tree.map(same, gradient(remat), gradient("none"))


@pytest.mark.parametrize("norms", [jnp.bfloat16, jnp.float32])
def test_bf16_weights_compute_in_bf16_whatever_the_norms_are_stored_in(norms):
    graphdef, params = split_clip()
    half = nnx.merge(
        graphdef,
        jax.tree.map_with_path(
            lambda path, p: p.astype(
                norms if "norm" in jax.tree_util.keystr(path) else jnp.bfloat16
            ),
            params,
        ),
    )
    half_type = jnp.dtype(jnp.bfloat16)
    assert {x.dtype for x in jax.eval_shape(half.text, IDS)} == {half_type, jnp.dtype(bool)}
    assert {x.dtype for x in jax.eval_shape(half.vision, images())} == {half_type}
    assert {x.dtype for x in jax.eval_shape(half, images(), IDS)} == {jnp.dtype(jnp.float32)}
    found = products(jax.make_jaxpr(lambda x, ids: tuple(half(x, ids)))(images(), IDS).jaxpr)
    assert len(found) >= 19  # 8 in each encoder's block, one for the patches, two projections
    for equation in found:
        assert {v.aval.dtype for v in equation.invars} == {jnp.dtype(jnp.bfloat16)}


def test_image_features_have_the_shapes_and_pool_the_class_token():
    model = vision()
    features = jax.jit(model)(images())
    assert features.tokens.shape == (3, 5, 16)
    np.testing.assert_allclose(features.pooled, model.final_norm(features.tokens[:, 0]), atol=1e-6)


def test_image_layers_are_counted_from_what_enters_the_first_block():
    @jax.jit
    def states(x):
        return [vision()(x, layer=layer).tokens for layer in (0, 1, 2, 3, -2, None)]

    first, second, third, last, before_last, default = states(images())
    np.testing.assert_allclose(first.mean(axis=-1), 0, atol=1e-6)  # it is normalised
    assert not np.allclose(second, third)
    np.testing.assert_allclose(third, before_last, atol=1e-6)
    np.testing.assert_allclose(last, default, atol=1e-6)


def test_hidden_states_are_the_tokens_of_every_layer():
    @jax.jit
    def states(x):
        return vision().hidden_states(x), [vision()(x, layer=k).tokens for k in range(4)]

    at_once, one_by_one = states(images())
    np.testing.assert_allclose(at_once, jnp.stack(one_by_one), atol=1e-6)


def test_the_vision_encoder_attends_in_both_directions():
    run = jax.jit(vision())
    changed = images().at[:, 8:, 8:].set(0)  # the last patch
    moved = jnp.abs(run(images()).tokens - run(changed).tokens).max(axis=(0, 2))
    assert (moved > 1e-6).all()


def test_images_of_another_size_are_refused():
    with pytest.raises(UserError, match="images are 24x16"):
        vision()(jnp.zeros((1, 16, 24, 3)))


def test_normalisation_takes_clips_mean_to_zero_and_one_deviation_to_one():
    mean, std = jnp.array(CLIP_MEAN), jnp.array(CLIP_STD)
    pixels = jnp.stack([mean, mean + std])[:, None, None] * 2 - 1
    np.testing.assert_allclose(normalize_for_clip(pixels)[:, 0, 0], [[0] * 3, [1] * 3], atol=1e-6)


def test_embeddings_are_unit_vectors_and_the_scale_is_capped():
    model = nnx.merge(*split_clip())
    out = jax.jit(model)(images(2), IDS)
    assert out.image.shape == (2, 8)
    assert out.text.shape == (3, 8)
    np.testing.assert_allclose(jnp.linalg.norm(out.image, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(out.text, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(out.logit_scale, 1 / 0.07, rtol=1e-6)
    graphdef, params = split_clip()

    def scale(log):
        params_at = nnx.to_pure_dict(params) | {"logit_scale": log}
        return nnx.merge(graphdef, params_at)(images(2), IDS).logit_scale

    capped, gradient = jax.jit(jax.value_and_grad(scale))(jnp.array(9.0))
    np.testing.assert_allclose(capped, MAX_LOGIT_SCALE, rtol=1e-5)
    assert gradient > 0  # or it could not come back


def test_from_its_first_weights_clip_learns_to_match_pairs():
    graphdef, params = split_clip()
    optimizer = optax.adam(3e-3)

    def loss(params):
        out = nnx.merge(graphdef, params)(images(), IDS)
        logits = out.logit_scale * out.image @ out.text.T
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(3)).mean()

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(40):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.1 < losses[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: text_config(heads=3), "text encoder: width 16"),
        (lambda: vision_config(heads=3), "image encoder: width 16"),
        (lambda: vision_config(patch_size=5), "patches of 5"),
        (
            lambda: ClipConfig(text=text_config(projection_dim=4), vision=vision_config()),
            r"4 \(text\) and None \(vision\)",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
