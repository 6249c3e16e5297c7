"""A tiny Stable Diffusion, written as diffusers has it, read back, drawn with and fine-tuned."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from jaxdiff.models.components import Latents, TextTower, TextualInversion
from PIL import Image

import jaxdiff
from jaxdiff.cli import main as cli
from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.data.transforms import Transforms
from jaxdiff.diffusion.losses import Objective
from jaxdiff.diffusion.schedules import ScaledLinear
from jaxdiff.diffusion.time_grids import TimeGrid, TrainStepGrid
from jaxdiff.errors import UserError
from jaxdiff.io.images import GAP
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.autoencoders.tiny import TinyAutoencoderConfig
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.layers import abstract_params, bind_init
from jaxdiff.models.lora import LoraConfig, factors
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.pipelines.lora import adapters_of
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.textual_inversion import Word
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.diffusers import INDEX, read_diffusers, write_diffusers
from jaxdiff.pretrained.embeddings import write_embedding
from jaxdiff.pretrained.load import read_bundle
from jaxdiff.sampling.sampler import SamplingConfig
from jaxdiff.sampling.solvers_ode import DDIM, Heun
from jaxdiff.training.loop import train
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.recipe import Config, TrainConfig
from jaxdiff.training.step import structure
from jaxdiff.training.tasks.diffusion import DiffusionTask, whole

TEXT = ClipTextConfig(vocab_size=540, length=77, width=8, depth=1, heads=2)
LARGER = dataclasses.replace(TEXT, width=4, depth=2, activation="gelu", projection_dim=6)
UNET = UNet2DConditionConfig(
    block_out_channels=(8,),
    layers_per_block=1,
    transformer_layers=(0,),
    heads=(2,),
    cross_attention_dim=8,
    norm_num_groups=4,
)
LEVELS = {"block_out_channels": (8, 8), "transformer_layers": (0, 1), "heads": (2, 2)}
AUTOENCODER = AutoencoderConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4)
TASK = DiffusionTask(
    denoiser=UNET,
    text=TextTower(model=TEXT, trained=False),
    latents=Latents(model=AUTOENCODER, pretrained="unused"),
    objective=Objective(prediction="eps", schedule=ScaledLinear()),
)
XL = dataclasses.replace(
    TASK,
    denoiser=dataclasses.replace(UNET, cross_attention_dim=12, added_width=6 + 24, time_id_width=4),
    text=TextTower(
        model=dataclasses.replace(TEXT, depth=2),
        trained=False,
        layer=-2,
        final_norm=False,
        pad_id=539,
    ),
    text_2=TextTower(model=LARGER, trained=False, layer=-2, final_norm=False, pad_id=0),
    zero_empty_prompt=True,
)
SAMPLING = SamplingConfig(
    solver=DDIM(), grid=TrainStepGrid(offset=1), unit_noise=True, num_steps=50, guidance_scale=7.5
)


def bundle(task, dtype=np.float32) -> Bundle:
    draw = np.random.default_rng(0)
    tokenizer = Tokenizer.train(["a red pea", "a green banana"] * 9, vocab_size=540)

    def random(build):
        return jax.tree.map(
            lambda x: (0.3 * draw.normal(size=x.shape)).astype(dtype), abstract_params(build)
        )

    params = random(bind_init(type(task).build, task))
    frozen = {name: random(part.build) for name, part in task.frozen().items()}
    config = Config(
        name="tiny",
        task=task,
        data=DataConfig(source=ImageFolder(path="images"), transforms=Transforms(size=16)),
        sampling=SAMPLING,
    )
    return Bundle(config, params, frozen, tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_diffusers(path, bundle(TASK))
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("task", [TASK, XL], ids=["SD", "XL"])
def test_it_comes_back_bit_for_bit(task, dtype, tmp_path):
    task = dataclasses.replace(task, denoiser=dataclasses.replace(task.denoiser, **LEVELS))
    there = bundle(task, dtype)
    write_diffusers(tmp_path, there)
    back = read_diffusers(tmp_path, place=np.asarray)
    assert back.tokenizer.bpe.get_vocab() == there.tokenizer.bpe.get_vocab()
    for ours, theirs in ((there.params, back.params), (there.frozen, back.frozen)):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert {x.dtype for x in jax.tree.leaves(theirs)} == {np.dtype(dtype)}
    task = back.config.task
    assert task.denoiser == there.config.task.denoiser
    assert task.latents.model == AUTOENCODER
    assert task.objective == there.config.task.objective
    assert [t.model for t in task.towers.values()] == [
        t.model for t in there.config.task.towers.values()
    ]
    assert [t.layer for t in task.towers.values()] == [
        t.layer for t in there.config.task.towers.values()
    ]
    grid = back.config.sampling.grid
    assert (grid, back.config.data.transforms.size) == (SAMPLING.grid, 16)


def test_the_prompt_matters_to_both_kinds(folder, tmp_path):
    write_diffusers(tmp_path, bundle(XL))
    for path in (folder, tmp_path):
        pipeline = jaxdiff.load(path)
        prompts = ["a red pea", "a banana", "a red pea"]
        images = pipeline(prompts, seeds=1, num_steps=2, output="float")
        assert images.shape == (3, 16, 16, 3)
        np.testing.assert_array_equal(images[0], images[2])
        assert np.abs(images[0] - images[1]).max() > 1e-5  # random weights hardly listen


@pytest.fixture
def tiny_folder(tmp_path):
    """The model in `folder` with a tiny autoencoder."""
    tiny = TinyAutoencoderConfig(width=4, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    task = dataclasses.replace(TASK, latents=Latents(model=tiny, pretrained="unused"))
    there = bundle(task)
    frozen = {**there.frozen, "text": bundle(TASK).frozen["text"]}  # drawn after the autoencoder
    write_diffusers(tmp_path / "tiny", there._replace(frozen=frozen))
    return tmp_path / "tiny"


def test_previews_are_decoded_by_a_tiny_autoencoder(folder, tiny_folder, tmp_path):
    words = ["a red pea", "--num-steps", "2", "--out", tmp_path, "--model"]
    preview = ["--preview", "1", "--preview-decoder", tiny_folder / "vae"]
    drawn = []
    for more in ([tiny_folder], [folder], [folder, *preview]):
        assert cli.main(["sample", *map(str, words + more)]) == 0
        drawn.append(np.asarray(Image.open(tmp_path / "0000-a-red-pea.png")))
    np.testing.assert_array_equal(drawn[2], drawn[1])
    shown = np.asarray(Image.open(tmp_path / "preview.png"))[GAP:-GAP, GAP:-GAP]
    np.testing.assert_allclose(shown.astype(int), drawn[0], atol=1)
    assert np.abs(shown.astype(int) - drawn[1]).max() > 10


def test_a_tiny_autoencoder_takes_the_place_of_the_large_one(folder, tiny_folder):
    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 4))
    images = [
        pipeline(["a red pea"], num_steps=1, latents=latents)
        for pipeline in (
            jaxdiff.load(tiny_folder),
            jaxdiff.load(folder).with_autoencoder(tiny_folder / "vae"),
        )
    ]
    np.testing.assert_array_equal(*images)
    config = json.loads((tiny_folder / "vae" / "config.json").read_text())
    (tiny_folder / "vae" / "config.json").write_text(json.dumps(config | {"act_fn": "tanh"}))
    with pytest.raises(UserError, match="act_fn is 'tanh'"):
        jaxdiff.load(folder).with_autoencoder(tiny_folder / "vae")


def test_an_autoencoder_of_other_latents_is_told(folder):
    with pytest.raises(UserError, match="latents of 4 channels, one for 2 pixels: not those"):
        jaxdiff.load().with_autoencoder(folder / "vae")


def test_an_inpainting_model_says_that_it_needs_a_mask(tmp_path):
    task = dataclasses.replace(TASK, denoiser=dataclasses.replace(UNET, in_channels=9))
    write_diffusers(tmp_path, bundle(task))
    assert json.loads((tmp_path / INDEX).read_text())["_class_name"].endswith("InpaintPipeline")
    with pytest.raises(UserError, match="is for inpainting"):
        jaxdiff.load(tmp_path)(["a red pea"])


def fine_tuning(folder, photos, **changes) -> Config:
    """One step on noise under one caption, from the checkpoint in `folder`."""
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text("a red pea")
    replace = dataclasses.replace
    source = str(folder)
    task = replace(
        TASK,
        pretrained=source,
        text=replace(TASK.text, pretrained=source),
        latents=replace(TASK.latents, pretrained=source),
        **changes,
    )
    return replace(
        read_bundle(folder).config,
        task=task,
        data=DataConfig(source=ImageFolder(path=str(photos)), transforms=Transforms(size=16)),
        train=TrainConfig(steps=1, batch_size=8, log_every=1),
        optimizer=AdamW(learning_rate=0.05),
    )


def told(pipeline, prompt) -> np.ndarray:
    """What the denoiser reads of a prompt."""
    ids, task = jnp.asarray(pipeline.tokenizer([prompt])), pipeline.task

    @jax.jit
    def read(weights):
        model = nnx.merge(structure(task), weights["params"])
        return task.features(model, weights["frozen"], ids, whole(16, 16, 1)).tokens

    return np.asarray(read(pipeline.weights))


def predicted(pipeline) -> np.ndarray:
    """What the denoiser says of noise and a prompt."""
    ids, task = jnp.asarray(pipeline.tokenizer(["a red pea"])), pipeline.task
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 4)), jnp.float32)

    @jax.jit
    def run(weights):
        model, frozen = nnx.merge(structure(task), weights["params"]), weights["frozen"]
        text = task.features(model, frozen, ids, whole(16, 16, 1))
        return task.network(model, frozen)(x, jnp.array([0.5]), text)

    return np.asarray(run(pipeline.weights))


@pytest.mark.slow
def test_it_is_fine_tuned_through_the_one_loop(folder, tmp_path):
    config = fine_tuning(folder, tmp_path)
    result = train(config, tmp_path / "run", say=lambda _: None)
    there = bundle(TASK).params["denoiser"]
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), result.state.params["denoiser"], there
    )
    assert 0 < max(jax.tree.leaves(moved)) < 0.2  # from where the checkpoint stands
    assert read_bundle(tmp_path / "run").tokenizer(["a", "red", "pea"]).shape == (3, 77)


@pytest.mark.slow
def test_adapters_are_trained_saved_and_read(folder, tmp_path):
    """Only they move; handed back as a file they do to the checkpoint what they did."""
    config = fine_tuning(folder, tmp_path, lora=LoraConfig(rank=2, alpha=4.0))
    result = train(config, tmp_path / "run", say=lambda _: None)
    adapters = result.state.params["denoiser"]
    assert {pair.down.shape[-1] for pair in factors(adapters).values()} == {2}
    assert len(jax.tree.leaves(adapters)) == 2 * len(factors(adapters))
    trained = read_bundle(tmp_path / "run")
    jax.tree.map(
        np.testing.assert_array_equal, trained.frozen["denoiser"], bundle(TASK).params["denoiser"]
    )
    cli.export([str(tmp_path / "run"), str(tmp_path / "lora"), "--format", "lora"])
    cli.export([str(tmp_path / "run"), str(tmp_path / "whole"), "--format", "diffusers"])
    base, found = jaxdiff.load(folder), adapters_of(trained)["denoiser"]
    apart = base.with_lora(tmp_path / "lora", scale=0.25).with_lora(tmp_path / "lora", scale=0.75)
    for path, pair in factors(apart.weights["params"]["denoiser"]).items():
        np.testing.assert_allclose(pair.product, found[path].product, rtol=1e-4, atol=1e-6)
    within, whole = base.with_lora(tmp_path / "lora", merge=True), jaxdiff.load(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, within.weights, whole.weights)
    ours, theirs, before = (predicted(pipeline) for pipeline in (Pipeline(trained), within, base))
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    assert np.abs(ours - before).max() > 1e-3 * np.abs(theirs).max()


@pytest.mark.slow
def test_a_word_is_learnt_saved_and_read(tmp_path):
    """Nothing else moves; the word does to the checkpoint what it did in training."""
    plain = bundle(TASK)
    text = dataclasses.replace(TEXT, vocab_size=plain.tokenizer.vocab_size)
    task = dataclasses.replace(TASK, text=dataclasses.replace(TASK.text, model=text))
    write_diffusers(tmp_path / "model", bundle(task))
    config = fine_tuning(
        tmp_path / "model", tmp_path, inversion=TextualInversion(initial="pea", vectors=2)
    )
    data = dataclasses.replace(
        config.data, source=ImageFolder(path=str(tmp_path), prompt="a <my-thing>")
    )
    towers = dataclasses.replace(config.task.text, model=text)
    config = dataclasses.replace(
        config,
        data=data,
        task=dataclasses.replace(config.task, text=towers),
        optimizer=AdamW(learning_rate=5.0),
    )
    result = train(config, tmp_path / "run", say=lambda _: None)
    assert [x.shape for x in jax.tree.leaves(result.state.params)] == [(2, 8)]
    trained = read_bundle(tmp_path / "run")
    pea = trained.tokenizer(["pea"])[0, 1]
    moved = result.state.params["words"]["text"] - trained.frozen["text"]["token_embedding"][pea]
    assert np.all(np.abs(moved).max(-1) > 0.01)
    cli.export([str(tmp_path / "run"), str(tmp_path / "word"), "--format", "embedding"])
    cli.export([str(tmp_path / "run"), str(tmp_path / "whole"), "--format", "diffusers"])
    base = jaxdiff.load(tmp_path / "model")
    longer = base.with_embedding(tmp_path / "word")
    again = longer.with_embedding(tmp_path / "word", word="<other>")
    whole = jaxdiff.load(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, longer.weights, whole.weights)
    word = ["a <my-thing>"]
    np.testing.assert_array_equal(longer.tokenizer(word), whole.tokenizer(word))
    learnt = told(Pipeline(trained), "a <my-thing>")
    for pipeline, prompt in ((longer, "a <my-thing>"), (again, "a <other>")):
        np.testing.assert_allclose(told(pipeline, prompt), learnt, atol=1e-5)
    assert np.abs(learnt - told(longer, "a pea")).max() > 0.1
    with pytest.raises(UserError, match="cannot be a new word"):
        longer.with_embedding(tmp_path / "word")


def test_a_word_of_another_width_is_told(folder, tmp_path):
    write_embedding(tmp_path, Word("<pea>", {"text": np.ones((1, 6), np.float32)}))
    with pytest.raises(UserError, match=r"of widths \[6\].*another model"):
        jaxdiff.load(folder).with_embedding(tmp_path)


def test_a_part_that_is_missing_is_told(tmp_path):
    write_diffusers(tmp_path, bundle(TASK))
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"vae/config\.json is missing"):
        read_bundle(tmp_path)


def test_a_pipeline_of_another_kind_is_told(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="FluxPipeline, which jaxdiff does not have"):
        read_bundle(tmp_path)


def test_tensors_of_another_shape_are_told_before_any_is_read(folder):
    place = []
    config = json.loads((folder / "unet" / "config.json").read_text())
    other = epath.Path(folder) / "unet" / "config.json"
    text = other.read_text()
    try:
        other.write_text(json.dumps(config | {"cross_attention_dim": 16}))
        with pytest.raises(UserError, match=r"widths 16|another shape"):
            read_diffusers(folder, place=place.append)
    finally:
        other.write_text(text)
    assert not place


@pytest.mark.parametrize(
    ("sampling", "told"),
    [({"solver": Heun()}, "Heun is none of"), ({"grid": TimeGrid()}, "TimeGrid")],
)
def test_what_diffusers_cannot_do_is_told(sampling, told, tmp_path):
    there = bundle(TASK)
    config = dataclasses.replace(there.config, sampling=dataclasses.replace(SAMPLING, **sampling))
    with pytest.raises(UserError, match=told):
        write_diffusers(tmp_path, there._replace(config=config))
    assert not (tmp_path / INDEX).exists()
