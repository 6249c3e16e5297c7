"""The timed steps of jaxdiff and PyTorch are the same: first and last losses agree."""

import dataclasses

import pytest

torch = pytest.importorskip("torch")


from benchmarks import torch_baseline
from jaxdiff.diffusion.schedules import ScaledLinear
from jaxdiff.models.autoencoders.tiny import TinyAutoencoderConfig
from jaxdiff.training.optimizer import AdamW, ConstantLR
from jaxdiff.training.tasks.diffusion import Pretrained

pytestmark = [pytest.mark.parity, pytest.mark.slow]


@pytest.mark.parametrize(("network", "remat"), [("DiT", "none"), ("U-Net", "full")])
def test_both_take_the_same_steps(network, remat, small_unet, tiny_recipe, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # it takes a minute
    config = tiny_recipe()
    task = config.task
    changes = {}
    if network == "U-Net":
        changes = {"autoencoder": TinyAutoencoderConfig(), "schedule": ScaledLinear()}
    denoiser = small_unet if network == "U-Net" else task.model.denoiser
    denoiser = dataclasses.replace(denoiser, remat=remat)
    task = dataclasses.replace(
        task,
        model=dataclasses.replace(task.model, denoiser=denoiser, **changes),
        pretrained=Pretrained(autoencoder="nowhere"),
    )
    optimizer = AdamW(learning_rate=1e-3, schedule=ConstantLR())
    config = dataclasses.replace(config, task=task, optimizer=optimizer)
    found = torch_baseline.measure(config, warmup=1, repeats=3)
    assert [one.name for one in found] == ["jaxdiff", "torch, eager", "torch, compiled"]
    for name, close in (("first_loss", 1e-5), ("last_loss", 1e-3)):
        ours, *theirs = (one.metrics[name] for one in found)
        assert theirs == pytest.approx([ours] * 2, rel=close)
    assert found[0].metrics["last_loss"] < found[0].metrics["first_loss"]
