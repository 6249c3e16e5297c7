import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from jaxdiff.bundle import model_folder
from jaxdiff.errors import UserError
from jaxdiff.pretrained import hub

REPOSITORY = [
    "README.md",
    "model.safetensors",
    "v1-5-pruned.ckpt",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "safety_checker/model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
]


def test_only_what_is_read_is_fetched():
    assert set(hub.wanted(REPOSITORY)) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    }


@pytest.mark.parametrize(
    ("there", "others"),
    [
        (  # an autoencoder
            ["config.json", "diffusion_pytorch_model.safetensors"],
            ["README.md", "taesd_decoder.safetensors", "diffusion_pytorch_model.bin"],
        ),
        (  # a CLIP
            ["config.json", "model.safetensors", "tokenizer.json", "vocab.json", "merges.txt"],
            ["pytorch_model.bin", "model.fp16.safetensors", "onnx/model.onnx"],
        ),
    ],
)
def test_a_repository_may_be_one_model(there, others):
    assert hub.wanted([*others, *there]) == there


def test_a_folder_here_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_id("runs/produce")
    (tmp_path / "runs" / "produce").mkdir(parents=True)
    assert not hub.is_hub_id("runs/produce")
    assert not hub.is_hub_id("produce")
    assert not hub.is_hub_id("/runs/produce")
    assert not hub.is_hub_id("../produce")


def test_a_model_that_cannot_be_had_is_told(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.huggingface_hub.HfApi, "list_repo_files", fail)
    with pytest.raises(UserError, match=r"nobody/nothing is no folder here .*no connection"):
        model_folder("nobody/nothing")


def test_a_model_of_the_hub_is_a_folder_in_the_cache(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(model, allow_patterns):
        asked.append((model, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub.huggingface_hub.HfApi, "list_repo_files", lambda *_: REPOSITORY)
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", snapshot_download)
    assert model_folder("somebody/something") == tmp_path
    assert asked == [("somebody/something", hub.wanted(REPOSITORY))]
