"""A tiny Stable Diffusion, written as diffusers has it, read back, sampled and fine-tuned."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

import jaxdiff
from jaxdiff.cli import main as cli
from jaxdiff.cli.export import export_command
from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.data.transforms import Transforms
from jaxdiff.diffusion.objectives import Denoising
from jaxdiff.diffusion.schedules import ScaledLinear
from jaxdiff.diffusion.time_grids import TimeGrid, TrainStepGrid
from jaxdiff.errors import UserError
from jaxdiff.io.images import GAP
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.autoencoders.tiny import TinyAutoencoderConfig
from jaxdiff.models.conditioning import (
    ClipConditioner,
    ClipTextEncoder,
    StableDiffusionXLConditioner,
    full_size_crop,
)
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.lora import LoraConfig, factors
from jaxdiff.models.text_encoders.clip import ClipTextConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines import lora, textual_inversion
from jaxdiff.pipelines.lora import adapters_of
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.diffusers_folder import read_diffusers, write_diffusers
from jaxdiff.pretrained.embeddings import Word, write_embedding
from jaxdiff.pretrained.load import load_bundle, read_spec, read_tokenizers
from jaxdiff.pretrained.pipeline_folder import INDEX
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_ode import DDIM, Heun
from jaxdiff.training.loop import train
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.recipe import Config, TrainConfig
from jaxdiff.training.tasks.diffusion import (
    DiffusionTask,
    Pretrained,
    TextualInversion,
    Trainable,
)

WORDS = 525  # tokens of the captions below
TEXT = ClipTextConfig(vocab_size=WORDS, length=77, width=8, depth=1, heads=2)
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
SD = TextToImage(
    name="tiny",
    denoiser=UNET,
    conditioner=ClipConditioner(text=ClipTextEncoder(model=TEXT), masked=False),
    autoencoder=AutoencoderConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4),
    prediction="eps",
    schedule=ScaledLinear(),
    image_size=16,
    sampler=Sampler(
        solver=DDIM(),
        grid=TrainStepGrid(offset=1),
        init_noise="unit",
        num_steps=50,
        guidance_scale=7.5,
    ),
)
INNER = {"hidden_layer": -2, "final_norm": False}
XL = dataclasses.replace(
    SD,
    denoiser=dataclasses.replace(UNET, cross_attention_dim=12, added_width=6 + 24, time_id_width=4),
    conditioner=StableDiffusionXLConditioner(
        text=ClipTextEncoder(model=dataclasses.replace(TEXT, depth=2), **INNER),
        text_2=ClipTextEncoder(model=LARGER, **INNER),
        zero_absent=False,
    ),
    sampler=dataclasses.replace(SD.sampler, guidance_scale=5.0),
)
REFINER = dataclasses.replace(
    XL,
    denoiser=dataclasses.replace(UNET, cross_attention_dim=4, added_width=6 + 20, time_id_width=4),
    conditioner=dataclasses.replace(XL.conditioner, text=None),
)
KINDS = pytest.mark.parametrize("spec", [SD, XL, REFINER], ids=["SD", "XL", "refiner"])


@pytest.fixture(scope="module")
def bundle(random_params):
    """`bundle(spec)`: with random weights, and tokenizers that pad as the published ones do."""
    plain = Tokenizer.train(["a red pea", "a green banana"] * 9, vocab_size=540)
    assert plain.vocab_size == WORDS
    tokenizers = {"text": plain, "text_2": plain.with_pad(0)}

    def make(spec, dtype=np.float32) -> Bundle:
        names = spec.conditioner.encoders
        return Bundle(spec, random_params(spec, dtype), {name: tokenizers[name] for name in names})

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bundle):
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_diffusers(path, bundle(SD))
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@KINDS
def test_it_comes_back_bit_for_bit(spec, dtype, bundle, tmp_path):
    spec = dataclasses.replace(spec, denoiser=dataclasses.replace(spec.denoiser, **LEVELS))
    there = bundle(spec, dtype)
    write_diffusers(tmp_path / "tiny", there)
    back = read_diffusers(tmp_path / "tiny", place=np.asarray)
    assert back.spec == read_spec(tmp_path / "tiny") == spec
    jax.tree.map(np.testing.assert_array_equal, back.params, there.params)
    assert {x.dtype for x in jax.tree.leaves(back.params)} == {np.dtype(dtype)}
    for tokenizers in (back.tokenizers, read_tokenizers(tmp_path / "tiny")):
        assert set(tokenizers) == set(spec.conditioner.encoders)
        for name, tokenizer in tokenizers.items():
            ids = there.tokenizers[name](["a red pea"])
            np.testing.assert_array_equal(tokenizer(["a red pea"]), ids)
            assert ids[0, -1] == (0 if name == "text_2" else tokenizer.end_id)


def test_adapters_and_words_become_part_of_the_weights(bundle, tmp_path):
    there = bundle(XL)
    rows = {"text": np.ones((2, 8), np.float32), "text_2": np.ones((2, 4), np.float32)}
    longer = textual_inversion.add_word(there, Word("<pea>", rows))
    kernel = there.params["denoiser"]["middle"]["transformer"]["blocks"]["cross"]["q"]["kernel"]
    path = ("middle", "transformer", "blocks", "cross", "q")
    down = np.ones((*kernel.shape[:-1], 1), np.float32)
    up = np.ones((len(kernel), 1, kernel.shape[-1]), np.float32)
    adapted = lora.attach(longer, {"denoiser": {path: lora.Factors(down, up)}})
    write_diffusers(tmp_path, adapted)
    back = read_diffusers(tmp_path, place=np.asarray)
    found = back.params["denoiser"]["middle"]["transformer"]["blocks"]["cross"]["q"]["kernel"]
    np.testing.assert_allclose(found, kernel + 1, rtol=1e-6)
    for name, encoder in back.spec.conditioner.encoders.items():
        assert (encoder.model.vocab_size, encoder.model.end_id) == (WORDS + 2, WORDS - 1)
        table = back.params["text_encoders"][name]["token_embedding"]
        np.testing.assert_array_equal(table[WORDS:], rows[name])
        words = ["a <pea> banana"]
        ids = longer.tokenizers[name](words)
        np.testing.assert_array_equal(back.tokenizers[name](words), ids)
        assert {WORDS, WORDS + 1} <= set(ids[0])


@pytest.mark.slow
def test_the_prompt_matters_to_both_kinds(folder, bundle, tmp_path):
    write_diffusers(tmp_path, bundle(XL))
    for path in (folder, tmp_path):
        pipeline = jaxdiff.load(path)
        prompts = ["a red pea", "a banana", "a red pea"]
        images = pipeline(prompts, seeds=1, num_steps=2, output="float")
        assert images.shape == (3, 16, 16, 3)
        np.testing.assert_array_equal(images[0], images[2])
        assert np.abs(images[0] - images[1]).max() > 1e-5  # random weights depend little on it


@pytest.fixture
def tiny_folder(bundle, tmp_path):
    """The model in `folder` with a tiny autoencoder."""
    tiny = TinyAutoencoderConfig(width=4, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    there = bundle(dataclasses.replace(SD, autoencoder=tiny))
    params = {**bundle(SD).params, "autoencoder": there.params["autoencoder"]}
    write_diffusers(tmp_path / "tiny", there._replace(params=params))
    return tmp_path / "tiny"


def test_previews_are_decoded_by_a_tiny_autoencoder(folder, tiny_folder, tmp_path):
    words = ["a red pea", "--num-steps", "2", "--out", tmp_path, "--model"]
    preview = ["--preview", "1", "--preview-decoder", tiny_folder / "vae"]
    images = []
    for more in ([tiny_folder], [folder], [folder, *preview]):
        assert cli.main(["sample", *map(str, words + more)]) == 0
        images.append(np.asarray(Image.open(tmp_path / "0000-a-red-pea.png")))
    np.testing.assert_array_equal(images[2], images[1])
    shown = np.asarray(Image.open(tmp_path / "preview.png"))[GAP:-GAP, GAP:-GAP]
    np.testing.assert_allclose(shown.astype(int), images[0], atol=1)
    assert np.abs(shown.astype(int) - images[1]).max() > 10


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


def test_an_autoencoder_of_other_latents_is_refused(folder):
    with pytest.raises(UserError, match="no autoencoder for the latents of icons"):
        jaxdiff.load().with_autoencoder(folder / "vae")


def test_an_inpainting_model_asks_for_a_mask(bundle, tmp_path):
    spec = dataclasses.replace(SD, denoiser=dataclasses.replace(UNET, in_channels=9))
    write_diffusers(tmp_path, bundle(spec))
    assert json.loads((tmp_path / INDEX).read_text())["_class_name"].endswith("InpaintPipeline")
    with pytest.raises(UserError, match="is for inpainting"):
        jaxdiff.load(tmp_path)(["a red pea"])


def fine_tuning(folder, photos, **changes) -> Config:
    """One step on noise under one caption, from the checkpoint in `folder`."""
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text("a red pea")
    source = str(folder)
    return Config(
        name="fine-tuned",
        task=DiffusionTask(
            model=read_spec(folder),
            pretrained=Pretrained(denoiser=source, text_encoders=source, autoencoder=source),
            objective=Denoising(),
            **changes,
        ),
        data=DataConfig(source=ImageFolder(path=str(photos)), transforms=Transforms(size=16)),
        train=TrainConfig(steps=1, batch_size=8, log_every=1),
        optimizer=AdamW(learning_rate=0.05),
    )


def encoded(bundle, prompt) -> np.ndarray:
    """Return what the denoiser reads of a prompt."""
    spec = bundle.spec
    inputs = spec.conditioner.tokenize(bundle.tokenizers, [prompt])
    return np.asarray(jax.jit(spec.encode_text)(bundle.params, inputs).tokens)


def predicted(bundle) -> np.ndarray:
    """Return the denoiser's output for noise and a prompt."""
    spec = bundle.spec
    tokens = spec.conditioner.tokenize(bundle.tokenizers, ["a red pea"])
    inputs = jax.tree.map(jnp.asarray, tokens)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 4)), jnp.float32)

    @jax.jit
    def run(params, inputs):
        cond = spec.encode_text(params, inputs)._replace(size_crop=full_size_crop(16, 16, 1))
        return spec.predict(params, x, jnp.array([0.5]), cond)

    return np.asarray(run(bundle.params, inputs))


@pytest.mark.slow
def test_it_is_fine_tuned_through_the_one_loop(folder, bundle, tmp_path):
    config = fine_tuning(folder, tmp_path)
    result = train(config, tmp_path / "run", log=lambda _: None)
    there = bundle(SD).params["denoiser"]
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), result.state.params["denoiser"], there
    )
    assert 0 < max(jax.tree.leaves(moved)) < 0.2  # from the checkpoint
    trained = load_bundle(tmp_path / "run")
    assert trained.spec == config.task.model
    assert trained.tokenizers["text"](["a", "red", "pea"]).shape == (3, 77)


@pytest.mark.slow
def test_adapters_are_trained_saved_and_read(folder, bundle, tmp_path):
    """They alone move; exported to a file they change the checkpoint as in training."""
    trainable = Trainable(lora=LoraConfig(rank=2, alpha=4.0))
    config = fine_tuning(folder, tmp_path, trainable=trainable)
    result = train(config, tmp_path / "run", log=lambda _: None)
    adapters = result.state.params["adapters"]["denoiser"]
    assert {pair.down.shape[-1] for pair in factors(adapters).values()} == {2}
    assert len(jax.tree.leaves(result.state.params)) == 2 * len(factors(adapters))
    trained = load_bundle(tmp_path / "run")
    jax.tree.map(
        np.testing.assert_array_equal, trained.params["denoiser"], bundle(SD).params["denoiser"]
    )
    export_command([str(tmp_path / "run"), str(tmp_path / "lora"), "--format", "lora"])
    export_command([str(tmp_path / "run"), str(tmp_path / "whole"), "--format", "diffusers"])
    base, found = jaxdiff.load(folder), adapters_of(trained)["denoiser"]
    file = tmp_path / "lora"
    twice = lora.apply_lora(lora.apply_lora(base, file, scale=0.25), file, scale=0.75)
    for path, pair in adapters_of(twice.bundle)["denoiser"].items():
        np.testing.assert_allclose(pair.product, found[path].product, rtol=1e-4, atol=1e-6)
    jax.tree.map(
        np.testing.assert_array_equal, lora.remove_lora(twice).bundle.params, base.bundle.params
    )
    within, whole = lora.apply_lora(base, file, merge=True), jaxdiff.load(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, within.bundle.params, whole.bundle.params)
    ours, theirs, before = (predicted(b) for b in (trained, within.bundle, base.bundle))
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    assert np.abs(ours - before).max() > 1e-3 * np.abs(theirs).max()


@pytest.mark.slow
def test_a_word_is_learnt_saved_and_read(bundle, tmp_path):
    """Nothing else moves; the word changes the checkpoint as in training."""
    write_diffusers(tmp_path / "model", bundle(SD))
    inversion = TextualInversion(initial="pea", vectors=2)
    config = fine_tuning(tmp_path / "model", tmp_path, trainable=Trainable(inversion=inversion))
    source = ImageFolder(path=str(tmp_path), prompt="a <my-thing>")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=source),
        optimizer=AdamW(learning_rate=5.0),
    )
    result = train(config, tmp_path / "run", log=lambda _: None)
    assert [x.shape for x in jax.tree.leaves(result.state.params)] == [(2, 8)]
    trained = load_bundle(tmp_path / "run")
    pea = trained.tokenizers["text"](["pea"])[0, 1]
    table = trained.params["text_encoders"]["text"]["token_embedding"]
    moved = result.state.params["added_tokens"]["text"] - table[pea]
    assert np.all(np.abs(moved).max(-1) > 0.01)
    export_command([str(tmp_path / "run"), str(tmp_path / "word"), "--format", "embedding"])
    export_command([str(tmp_path / "run"), str(tmp_path / "whole"), "--format", "diffusers"])
    base = jaxdiff.load(tmp_path / "model")
    longer = textual_inversion.apply_embedding(base, tmp_path / "word")
    both = textual_inversion.apply_embedding(longer, tmp_path / "word", word="<other>")
    whole = load_bundle(tmp_path / "whole")
    word = ["a <my-thing>"]
    np.testing.assert_array_equal(longer.tokenizers["text"](word), whole.tokenizers["text"](word))
    learnt = encoded(trained, "a <my-thing>")
    for model, prompt in (
        (longer.bundle, "a <my-thing>"),
        (both.bundle, "a <other>"),
        (whole, "a <my-thing>"),
    ):
        np.testing.assert_allclose(encoded(model, prompt), learnt, atol=1e-5)
    assert np.abs(learnt - encoded(longer.bundle, "a pea")).max() > 0.1
    with pytest.raises(UserError, match="cannot be a new word"):
        textual_inversion.apply_embedding(longer, tmp_path / "word")


def test_a_word_of_another_width_is_refused(folder, tmp_path):
    write_embedding(tmp_path, Word("<pea>", {"text": np.ones((1, 6), np.float32)}))
    with pytest.raises(UserError, match=r"of widths \[6\]: expected \[8\]"):
        textual_inversion.apply_embedding(jaxdiff.load(folder), tmp_path)


def test_a_missing_part_is_reported(bundle, tmp_path):
    write_diffusers(tmp_path, bundle(SD))
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"vae/config\.json cannot be read"):
        load_bundle(tmp_path)


def test_an_autoencoder_is_a_model_by_itself(folder, bundle):
    vae = load_bundle(folder / "vae")
    assert vae.spec == SD.autoencoder
    jax.tree.map(np.testing.assert_array_equal, vae.params, bundle(SD).params["autoencoder"])


def test_tensors_of_another_shape_are_reported_before_any_is_read(folder):
    place = []
    config = json.loads((folder / "unet" / "config.json").read_text())
    other = epath.Path(folder) / "unet" / "config.json"
    text = other.read_text()
    try:
        other.write_text(json.dumps(config | {"block_out_channels": [16]}))
        with pytest.raises(UserError, match="another shape"):
            read_diffusers(folder, place=place.append)
    finally:
        other.write_text(text)
    assert not place


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"solver": Heun()}, "has the solver Heun"), ({"grid": TimeGrid()}, "TimeGrid")],
)
def test_what_diffusers_cannot_do_is_refused(changes, message, bundle, tmp_path):
    sampler = dataclasses.replace(SD.sampler, **changes)
    there = bundle(SD)._replace(spec=dataclasses.replace(SD, sampler=sampler))
    with pytest.raises(UserError, match=message):
        write_diffusers(tmp_path, there)
    assert not (tmp_path / INDEX).exists()
