"""LCM-LoRA: consistency distillation of adapters of a small Stable Diffusion, end to end."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import jaxdiff
from jaxdiff.cli import export
from jaxdiff.cli.export import ExportOptions, export_model
from jaxdiff.data.tokenizer import Tokenizer
from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.unet_sd import UNet2DConditionConfig
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.pipelines.lora import apply_lora
from jaxdiff.pretrained import load
from jaxdiff.pretrained.bundle import Bundle, abstract_of, write_bundle
from jaxdiff.pretrained.lora import FILE
from jaxdiff.training.loop import train
from jaxdiff.training.recipe import load_recipe
from jaxdiff.training.tasks.diffusion import DiffusionTask, Pretrained
from tests.test_recipes import ROOT

pytestmark = pytest.mark.slow

WIDTH, SIDE, STEPS = 8, 16, 4


def write_model(folder: Path, spec: TextToImage) -> None:
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), abstract_of(spec)
    )
    tokenizer = Tokenizer.train(["a red pea", "a green banana"] * 9, vocab_size=540, length=16)
    write_bundle(folder, Bundle(spec, params, {"text": tokenizer}), "float32")


def write_photos(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red pea")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe with a small U-Net on pixels, whose random weights are on disk."""
    folder = tmp_path_factory.mktemp("models")
    config = load_recipe(ROOT / "configs" / "sd15_lcm_lora.py")
    task, replace = config.task, dataclasses.replace
    assert isinstance(task, DiffusionTask)
    conditioner = task.model.conditioner
    text = replace(conditioner.text.model, vocab_size=540, length=16, width=WIDTH, depth=2, heads=2)
    model = replace(
        task.model,
        denoiser=UNet2DConditionConfig(
            in_channels=3,
            out_channels=3,
            block_out_channels=(WIDTH, WIDTH),
            layers_per_block=1,
            transformer_layers=(0, 1),
            heads=(2, 2),
            cross_attention_dim=WIDTH,
            norm_num_groups=4,
        ),
        conditioner=replace(conditioner, text=replace(conditioner.text, model=text)),
        autoencoder=None,
        image_size=SIDE,
    )
    write_model(folder / "model", model)
    source = str(folder / "model")
    write_photos(folder / "photos")
    return replace(
        config,
        task=replace(
            task,
            model=model,
            trainable=replace(task.trainable, lora=replace(task.trainable.lora, rank=2)),
            pretrained=Pretrained(denoiser=source, text_encoders=source),
        ),
        data=replace(
            config.data,
            source=replace(config.data.source, path=str(folder / "photos")),
            transforms=replace(config.data.transforms, size=SIDE),
            workers=0,
        ),
        tokenizer=replace(config.tokenizer, vocab_size=540, length=16),
        train=replace(config.train, steps=STEPS, batch_size=8, log_every=1, compute="float32"),
    )


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return train(recipe, folder, log=lambda _: None), folder


def test_adapters_alone_are_trained(recipe, run):
    result, folder = run
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
    assert len(losses) == STEPS
    assert np.isfinite(losses).all()
    assert set(result.state.params) == {"adapters"}
    changed = jax.tree.map(lambda x: bool(np.any(x)), result.state.params)
    assert all(jax.tree.leaves(changed))  # B starts at zero, A does not


def test_the_export_is_a_file_of_diffusers_that_samples_in_four_steps(recipe, run, tmp_path):
    _, folder = run
    options = ExportOptions(run=str(folder), out=str(tmp_path / "lcm"), format="lora")
    export_model(options)
    names = load_file(tmp_path / "lcm" / FILE)
    for layer in (
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "mid_block.attentions.0.proj_in",
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.resnets.0.time_emb_proj",
        "down_blocks.0.downsamplers.0.conv",
        "up_blocks.0.resnets.0.conv_shortcut",
    ):
        assert f"unet.{layer}.lora_A.weight" in names
        assert f"unet.{layer}.lora_B.weight" in names
    student, sampler = jaxdiff.load(folder), recipe.task.model.sampler
    assert sampler.num_steps == 4
    expected = student("a red pea", seeds=3, output="float")
    base = jaxdiff.load(recipe.task.pretrained.denoiser)
    adapted = apply_lora(base, tmp_path / "lcm")("a red pea", seeds=3, output="float")
    np.testing.assert_allclose(adapted, expected, rtol=0, atol=1e-4)


def test_the_adapters_alone_sample_like_the_run(recipe, run, tmp_path, monkeypatch):
    _, folder = run
    options = ExportOptions(
        run=str(folder), out=str(tmp_path / "lcm"), format="adapters", dtype="float32"
    )
    with pytest.raises(UserError, match="expected one that others can name"):
        export_model(options)
    models = Path(recipe.task.pretrained.denoiser).parent
    monkeypatch.setattr(load, "SHIPPED", load.SHIPPED.__class__(models))
    monkeypatch.setattr(export, "base_of", lambda *_: "shipped:model")
    export_model(options)
    assert (
        "as low-rank adapters (LoRA) of another model" in (tmp_path / "lcm/README.md").read_text()
    )
    images = [jaxdiff.load(m)("a red pea", seeds=3, output="float") for m in (folder, options.out)]
    np.testing.assert_allclose(*images, rtol=0, atol=1e-4)
