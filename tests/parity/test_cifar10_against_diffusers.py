"""The comparison on CIFAR-10: its classifier, its training of diffusers, and all of its stages."""

import dataclasses
import io
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

pytest.importorskip("diffusers")

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks import cifar10_against_diffusers as comparison
from benchmarks import torch_unconditional as unconditional
from benchmarks.photo_classifier import accuracy, features_of, train_classifier
from jaxdiff.errors import UserError
from jaxdiff.models.denoisers.unet_small import UNetConfig

pytestmark = pytest.mark.parity

TINY = {
    "block_out_channels": (32,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


def photos_of_two_classes(count, size):
    """Noise on dark and on bright images, in turns."""
    rng, labels = np.random.default_rng(0), np.arange(count) % 2
    noise = rng.integers(0, 100, (count, size, size, 3))
    return (noise + 150 * labels[:, None, None, None]).astype(np.uint8), labels


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(unconditional.NETWORKS, "tiny", TINY)


def test_the_classifier_learns_and_its_features_depend_on_one_image_alone():
    photos, labels = photos_of_two_classes(128, 8)
    params = train_classifier(photos, labels, epochs=10)
    assert accuracy(params, photos, labels) > 0.95
    features = features_of(params, photos)
    np.testing.assert_array_equal(features[100:103], features_of(params, photos[100:103]))


def test_the_same_seed_trains_the_same_classifier():
    photos, labels = photos_of_two_classes(64, 8)
    one, two = (
        features_of(train_classifier(photos, labels, epochs=2), photos[:4]) for _ in range(2)
    )
    np.testing.assert_array_equal(one, two)


def test_training_diffusers_resumes_where_it_was_saved(tmp_path, tiny):
    photos, _ = photos_of_two_classes(40, 8)
    training = unconditional.Training(network="tiny", minutes=1, every=1)
    whole = unconditional.Trainer(training, tmp_path / "whole", photos)
    losses = [whole.step() for _ in range(4)]
    for i in (0, 2):
        part = unconditional.Trainer(training, tmp_path / "parts", photos)
        assert [part.step(), part.step()] == losses[i : i + 2]
        part.save()
    average = zip(whole.ema.shadow_params, part.ema.shadow_params, strict=True)
    assert all(torch.equal(a, b) for a, b in average)
    assert unconditional.snapshots(tmp_path / "parts") == {2: 0.0, 4: 0.0}


def test_training_diffusers_ends_with_the_clock(tmp_path, tiny):
    photos, _ = photos_of_two_classes(40, 8)
    training = unconditional.Training(network="tiny", minutes=0.02, every=0.01)
    unconditional.train(training, tmp_path, photos, log=lambda _: None)
    found = unconditional.snapshots(tmp_path)
    assert max(found.values()) >= 0.02
    assert len(found) >= 1
    steps = max(found)
    unconditional.train(training, tmp_path, photos, log=lambda _: None)
    assert max(unconditional.snapshots(tmp_path)) == steps


def test_seeds_make_images_of_diffusers(tmp_path, tiny):
    photos, _ = photos_of_two_classes(40, 8)
    training = unconditional.Training(network="tiny", minutes=1, every=1)
    unconditional.Trainer(training, tmp_path, photos).save()
    sample = unconditional.sampler(tmp_path, "tiny", 0, size=8, num_steps=2)
    images = sample(range(3))
    assert images.shape == (3, 8, 8, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images[2:], sample(range(2, 3)))


def write_parquet(path, count):
    photos, labels = photos_of_two_classes(count, 32)
    images = []
    for photo in photos:
        buffer = io.BytesIO()
        Image.fromarray(photo).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    captions = [f"a photo of class {label}" for label in labels]
    pq.write_table(pa.table({"image": images, "caption": captions}), path)


@pytest.mark.slow
def test_all_stages_run_and_skip_what_is_there(tmp_path, tiny, monkeypatch):
    write_parquet(tmp_path / "data.parquet", 80)
    load = comparison.load_recipe

    def small(path):
        config = load(path)
        model = config.task.model
        denoiser = UNetConfig(patch_size=4, widths=(16, 16), attention=(False, True))
        denoiser = dataclasses.replace(
            denoiser,
            heads=2,
            text_width=model.denoiser.text_width,
            pooled_width=model.denoiser.pooled_width,
        )
        sampler = dataclasses.replace(model.sampler, num_steps=2)
        model = dataclasses.replace(model, denoiser=denoiser, sampler=sampler)
        return dataclasses.replace(
            config,
            task=dataclasses.replace(config.task, model=model),
            train=dataclasses.replace(config.train, batch_size=8),
        )

    monkeypatch.setattr(comparison, "load_recipe", small)
    options = comparison.Options(
        data=str(tmp_path / "data.parquet"),
        out=str(tmp_path / "out"),
        minutes=0.01,
        every=0.005,
        samples=6,
        networks=("tiny",),
        ddim_steps=2,
        epochs=1,
    )
    for stage in comparison.STAGES.values():
        stage(options)
    report = json.loads((options.folder / "report.json").read_text())
    assert report["classifier"]["held_out"] == 8
    assert {row["side"] for row in report["snapshots"]} == {"jaxdiff", "diffusers-tiny"}
    assert all(row["frechet"] > 0 for row in report["snapshots"])
    assert all(row["minutes"] > 0 for row in report["snapshots"])
    last = [row["step"] for row in report["snapshots"] if row["side"] == "jaxdiff"][-1]
    assert (options.folder / f"jaxdiff-{last:06d}.png").exists()

    def again(*_, **__):
        raise AssertionError("done already")

    for module, name in ((comparison, "jaxdiff_sampler"), (unconditional, "sampler")):
        monkeypatch.setattr(module, name, again)
    for name in ("train_classifier", "run_recipe"):
        monkeypatch.setattr(comparison, name, again)
    for stage in comparison.STAGES.values():
        stage(options)
    assert json.loads((options.folder / "report.json").read_text()) == report


def test_missing_data_is_a_user_error(tmp_path):
    options = comparison.Options(data=str(tmp_path / "no.parquet"), out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"--data .*no\.parquet: expected a Parquet file"):
        comparison.prepare(options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--stages", "score"), "--stages: there is no 'score'"),
        (("--networks", "large"), "--networks: there is no 'large'"),
        (("--minutes", "0"), "minutes is 0"),
    ],
)
def test_a_user_error_is_one_sentence(words, message, capsys):
    assert comparison.main(words) == 2
    assert message in capsys.readouterr().err
