"""The loss of klein on images with references is that of diffusers' transformer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.data.loader import ON_DEVICE, make_dataset
from jaxdiff.diffusion.objectives import LossOutputs, Objective
from jaxdiff.diffusion.row_keys import RowKeys
from jaxdiff.pretrained.load import load_bundle, read_spec
from jaxdiff.training.initial_weights import load_parts
from tests.training.test_references import BATCH, SQUARE, WIDE, pairs_of, uncached, write_pairs

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from tests.parity.families import make_pipeline

pytestmark = pytest.mark.parity

TIME, NOISE = 0.7, 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtOneTime(Objective):
    """The loss of flow matching at one time, from noise that is known."""

    def loss(self, inputs):
        noise = jax.random.normal(jax.random.key(NOISE), inputs.x0.shape)
        times = jnp.full(len(noise), TIME)
        predicted = inputs.model((1 - TIME) * inputs.x0 + TIME * noise, times, inputs.cond)
        loss = jnp.mean((predicted - (noise - inputs.x0)) ** 2, (1, 2, 3))
        return LossOutputs(loss, times, {}, ())


def test_the_loss_with_references_is_diffusers(tmp_path):
    theirs = make_pipeline("klein base", tmp_path)
    theirs.save_pretrained(tmp_path / "klein base")
    write_pairs(tmp_path / "pairs", [(SQUARE, WIDE, SQUARE)] * BATCH)
    spec = read_spec(tmp_path / "klein base")
    config = pairs_of(spec, tmp_path / "klein base", tmp_path / "pairs", references=2)
    task = dataclasses.replace(config.task, objective=AtOneTime())
    tokenize = task.tokenize(load_bundle(tmp_path / "klein base").tokenizers)
    transforms = dataclasses.replace(config.data.transforms, caption_dropout=0.0)
    data = dataclasses.replace(uncached(config), transforms=transforms)
    batch = next(iter(make_dataset(data, tokenize, batch_size=BATCH, seed=0)))
    params, frozen = (
        jax.tree.map(jnp.asarray, load_parts(parts))
        for parts in (task.initial_parts(), task.frozen_parts())
    )
    keys = RowKeys.whole(jax.random.key(0), BATCH)

    @jax.jit
    def ours(params, frozen, batch):
        x0 = task.x0(task.model_params(params, frozen), batch, keys.split()[0])
        return task.loss(params, frozen, batch, keys, task.init_state(), params)[0], x0

    loss, x0 = ours(params, frozen, {k: v for k, v in batch.items() if k in ON_DEVICE})

    def nchw(x):
        return torch.from_numpy(np.asarray(x, np.float32).transpose(0, 3, 1, 2).copy())

    def latents(images):
        z = theirs._patchify_latents(theirs.vae.encode(nchw(images / 127.5 - 1)).latent_dist.mode())
        norm = theirs.vae.bn
        mean, variance = (x.view(1, -1, 1, 1) for x in (norm.running_mean, norm.running_var))
        return (z - mean) / torch.sqrt(variance + theirs.vae.config.batch_norm_eps)

    noise, x0 = nchw(jax.random.normal(jax.random.key(NOISE), x0.shape)), nchw(x0)
    with torch.no_grad():
        references = [latents(images) for images in batch["references"]]
        images = [(1 - TIME) * x0 + TIME * noise, *references]
        ids = theirs._prepare_image_ids([x[:1] for x in references]).expand(BATCH, -1, -1)
        words, word_ids = theirs.encode_prompt(
            prompt=["an edit"] * BATCH, text_encoder_out_layers=(9, 18, 27)
        )
        predicted = theirs.transformer(
            hidden_states=torch.cat([theirs._pack_latents(x) for x in images], dim=1),
            timestep=torch.full((BATCH,), TIME),
            guidance=None,
            encoder_hidden_states=words,
            txt_ids=word_ids,
            img_ids=torch.cat([theirs._prepare_latent_ids(x0), ids], dim=1),
        ).sample
    target = theirs._pack_latents(noise - x0)
    expected = ((predicted[:, : target.shape[1]] - target) ** 2).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
