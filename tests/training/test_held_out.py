"""Held-out loss: by noise level, in training and afterwards, for any task."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from jaxdiff.cli import main as cli
from jaxdiff.distributed.mesh import MeshConfig, make_mesh
from jaxdiff.errors import UserError
from jaxdiff.evaluation.evaluator import EvalContext
from jaxdiff.evaluation.held_out import HeldOutLoss
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.models.text_encoders.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from jaxdiff.pretrained.bundle import Bundle
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.training.held_out import bundle_metrics, held_out_metrics
from jaxdiff.training.run import run_recipe
from jaxdiff.training.tasks.autoencoder import AutoencoderTask
from jaxdiff.training.tasks.clip import ClipTask

LEVELS = [f"held_out/loss_by_level/{i}" for i in range(10)]


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    config = tiny_recipe(steps=2, batch_size=8)
    data = dataclasses.replace(config.data, held_out=0.2)
    evaluators = (HeldOutLoss(samples=32, every=1),)
    mesh = MeshConfig(data=1, fsdp=8)
    return dataclasses.replace(config, data=data, evaluators=evaluators, mesh=mesh)


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_recipe(recipe, str(folder), log=lambda _: None)
    return folder


def test_a_run_logs_the_loss_by_noise_level(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reports = [line for line in lines if "held_out/loss" in line]
    assert [report["step"] for report in reports] == [1, 2]
    for report in reports:
        assert set(LEVELS) <= report.keys()
        levels = [report[name] for name in LEVELS]
        assert min(levels) < report["held_out/loss"] < max(levels)
    assert reports[0]["held_out/loss"] != reports[1]["held_out/loss"]


def test_afterwards_the_model_has_the_loss_of_its_sharded_training(run, tmp_path):
    assert cli.main(["evaluate", str(run), "--samples", "32", "--out", str(tmp_path)]) == 0
    after = json.loads((tmp_path / "evaluation.json").read_text())
    trained = json.loads((run / "summary.json").read_text())
    assert after["figures"] == pytest.approx(trained["evaluation"], rel=1e-4)
    assert after["provenance"]["figures"] == trained["provenance"]["figures"]


def test_the_loss_does_not_depend_on_the_size_of_the_batch(run, recipe):
    bundle = load_bundle(str(run))
    (whole, about), (parts, same) = (
        bundle_metrics(recipe, bundle, 32, batch_size=b) for b in (32, 8)
    )
    assert about == same
    assert (about["records"], about["task"]) == (32, "DiffusionTask")
    assert bundle_metrics(recipe, bundle, 8).provenance["records_sha256"] != about["records_sha256"]
    np.testing.assert_allclose(whole["loss"], parts["loss"], rtol=1e-5)
    np.testing.assert_allclose(whole["loss_by_level"], parts["loss_by_level"], rtol=1e-4)


def test_an_autoencoder_has_its_own_loss(tiny_recipe):
    config = tiny_recipe(batch_size=4)
    model = AutoencoderConfig(
        latent_channels=2, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4
    )
    data = dataclasses.replace(config.data, held_out=0.1)
    config = dataclasses.replace(config, task=AutoencoderTask(model=model), data=data)
    params = config.task.init_params(nnx.Rngs(0))
    found = bundle_metrics(config, Bundle(model, params, {}), 8)
    assert {"loss", "psnr", "kl"} <= found.metrics.keys()
    report = HeldOutLoss(samples=8).evaluate(
        EvalContext(0, model, params, {}, data, loss=lambda samples: found)
    )
    assert report.scalars["loss"] == pytest.approx(float(found.metrics["loss"]))
    assert report.provenance["loss"] == found.provenance


def test_a_clip_has_its_contrastive_loss(tiny_recipe, tiny_bundle):
    config = tiny_recipe(batch_size=4)
    sizes = {"width": 16, "depth": 1, "heads": 2, "projection_dim": 8}
    text = ClipTextConfig(vocab_size=600, length=16, **sizes)
    model = ClipConfig(text=text, vision=ClipVisionConfig(image_size=32, patch_size=16, **sizes))
    data = dataclasses.replace(config.data, held_out=0.1)
    config = dataclasses.replace(config, task=ClipTask(model=model), data=data)
    params = config.task.init_params(nnx.Rngs(0))
    found, about = bundle_metrics(config, Bundle(model, params, tiny_bundle.tokenizers), 8)
    assert about["batch_size"] == 4
    assert 0.5 < float(found["loss"]) < 4  # about log 4, chance in a batch of 4
    assert 0 <= float(found["accuracy_image_to_text"]) <= 1


def test_a_share_of_no_batch_is_a_mistake(recipe, run):
    data = dataclasses.replace(recipe.data, held_out=0.001)
    config = dataclasses.replace(recipe, data=data)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with pytest.raises(UserError, match=r"holds out \d records: expected at least a batch, 8"):
        held_out_metrics(config, {}, {}, {}, mesh, 8)


def test_a_share_of_no_batch_is_refused_before_training(recipe, tmp_path):
    data = dataclasses.replace(recipe.data, held_out=0.001)
    config = dataclasses.replace(recipe, data=data)
    with pytest.raises(UserError, match=r"holds out \d records: expected at least a batch, 8"):
        run_recipe(config, str(tmp_path), log=lambda _: None)
    assert not (tmp_path / "checkpoints").exists()


def test_a_recipe_without_held_out_records_is_refused_before_training(tiny_recipe, tmp_path):
    config = dataclasses.replace(tiny_recipe(), evaluators=(HeldOutLoss(),))
    with pytest.raises(UserError, match=r"data\.held_out is 0: set it to a share such as 0\.01"):
        run_recipe(config, str(tmp_path), log=lambda _: None)
