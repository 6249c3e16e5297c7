import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
import types
from typing import ClassVar

import pytest
from huggingface_hub.hf_api import RepoSibling

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


def test_only_what_is_read_is_downloaded():
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
        (["model.fp16.safetensors"], ["model.bf16.safetensors"]),
        (
            ["model.safetensors.index.bf16.json", "model.bf16-00001-of-00001.safetensors"],
            ["README.md"],
        ),
    ],
)
def test_a_repository_may_be_one_model(there, others):
    assert hub.wanted([*others, *there]) == there


def test_a_folder_of_a_transformer_with_a_chat_template():
    files = [
        "model_index.json",
        "text_encoder/config.json",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "tokenizer/chat_template.jinja",
        "tokenizer/tokenizer.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    others = ["flux-2-klein-4b.safetensors", "assets/teaser.jpg"]
    assert hub.wanted([*others, *files]) == files
    rest = [file for file in files if file != "transformer/diffusion_pytorch_model.safetensors"]
    assert hub.wanted([*others, *files], without="transformer") == rest


def test_a_local_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_id("runs/produce")
    (tmp_path / "runs" / "produce").mkdir(parents=True)
    assert not hub.is_hub_id("runs/produce")
    assert not hub.is_hub_id("produce")
    assert not hub.is_hub_id("/runs/produce")
    assert not hub.is_hub_id("../produce")


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's interface that its client uses, for one model."""

    files: ClassVar = {name: f"{name} itself".encode() for name in REPOSITORY}
    broken: ClassVar[set[str]] = set()  # answered with an error
    gated: ClassVar[set[str]] = set()  # answered with the error of a licence that is not accepted
    asked: ClassVar[list[str]] = []
    commit = "a" * 40

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self.wfile.write(self._answer())

    def log_message(self, *_):
        """Says nothing."""

    def _answer(self) -> bytes:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if name in self.broken | self.gated or "" in self.broken:
            self.send_response(403)
            if name in self.gated:
                self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return b""
        if path.startswith("/api/models/somebody/something/tree/"):
            one = {"type": "file", "oid": "b" * 40}
            tree = [{"path": name, "size": len(data), **one} for name, data in self.files.items()]
            data = json.dumps(tree).encode()
        elif path.startswith("/api/models/somebody/something"):
            names = [{"rfilename": name} for name in self.files]
            data = json.dumps({"id": "a", "sha": self.commit, "siblings": names}).encode()
        else:
            name = path.partition(f"/resolve/{self.commit}/")[2]
            data = self.files.get(name)
            self.asked += [name] if name else []
        self.send_response(200 if data else 404)
        if data:
            self.send_header("ETag", hashlib.sha1(data).hexdigest())
            self.send_header("X-Repo-Commit", self.commit)
        else:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        return data or b""


def test_a_model_is_downloaded_once_and_found_again_without_a_connection(tmp_path):
    """By the hub's own client, from a server here."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def load(model: str) -> str:
        code = f"from jaxdiff.pretrained.hub import download; print(download({model!r}))"
        address = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        env = os.environ | address | {"HF_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        return (run.stdout or run.stderr).splitlines()[-1]

    Hub.broken = {"merges.txt"}
    assert "cannot be downloaded from the hub" in load("somebody/something")  # not half of it
    Hub.broken, Hub.gated = set(), {"merges.txt"}
    assert "accept it on the model's page of the hub" in load("somebody/something")
    Hub.gated = set()
    folder = pathlib.Path(load("somebody/something"))
    found = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    assert sorted(found) == sorted(hub.wanted(REPOSITORY)) == sorted(set(Hub.asked))
    assert (folder / "unet/config.json").read_text() == "unet/config.json itself"
    assert "cannot be downloaded from the hub" in load("nobody/nothing")
    Hub.broken = {""}
    assert load("somebody/something") == str(folder)
    server.shutdown()
    server.server_close()
    assert load("somebody/something") == str(folder)
    assert "Connection refused" in load("somebody/other")


def test_a_repository_of_pickled_weights_is_refused(monkeypatch):
    files = [RepoSibling(rfilename=name) for name in ("config.json", "pytorch_model.bin")]
    answer = types.SimpleNamespace(siblings=files)
    monkeypatch.setattr(hub.huggingface_hub.HfApi, "model_info", lambda *_: answer)
    with pytest.raises(UserError, match="has no weights that jaxdiff reads: expected safetensors"):
        hub.download("somebody/old")
