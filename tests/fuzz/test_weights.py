import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save

from jaxdiff.pretrained.embeddings import read_embedding
from jaxdiff.pretrained.load import load_bundle, read_spec
from jaxdiff.pretrained.lora import read_lora
from jaxdiff.pretrained.safetensors_io import TensorFiles
from jaxdiff.pretrained.single_file import read_original_spec
from tests.fuzz.harness import changed_json, counts, guarded, mutations, survives

F32 = np.float32


def _corpus() -> list[bytes]:
    down, up = np.ones((2, 32), F32), np.ones((32, 2), F32)
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    return [
        save({"a": np.ones((2, 3), F32), "b": np.ones(4, np.float16)}, {"format": "pt"}),
        save({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}),
        save({"lora_unet_a.lora_down.weight": down, "lora_unet_a.alpha": np.asarray(1, F32)}),
        save({"<word>": np.ones((2, 16), F32)}),
        save({"emb_params": np.ones((2, 16), F32)}),
        save({"model.diffusion_model.input_blocks.0.0.weight": np.ones((4, 4, 3, 3), F32)}),
    ]


@counts(500, 100_000)
def test_files_of_weights(count, folder, tiny_spec):
    file = epath.Path(folder / "a.safetensors")
    with guarded(folder):
        for data in mutations(_corpus(), count):
            file.write_bytes(data)

            def read():
                tensors = TensorFiles([file])
                return [np.sum(tensors[name]) for name in tensors]

            survives(read, data)
            survives(lambda: read_embedding(file, tiny_spec), data)
            survives(lambda: read_original_spec(file), data)


@counts(300, 100_000)
def test_lora_files(count, folder, unet_spec):
    file = epath.Path(folder / "a.safetensors")
    with guarded(folder):
        for data in mutations(_corpus(), count):
            file.write_bytes(data)
            survives(lambda: read_lora(file, unet_spec), data)


@pytest.mark.parametrize("kind", ["exported", "diffusers", "run"])
@counts(40, 2000)
def test_folders_of_models(kind, count, folder, models):
    """One file of a model is changed, removed, made a folder or a link that leads nowhere."""
    there = folder / "model"
    shutil.copytree(models[kind], there)
    files = sorted(path for path in there.rglob("*") if path.is_file())
    contents = {path: path.read_bytes() for path in files}
    rng = random.Random(0)
    with guarded(folder):
        for _ in range(count):
            path = rng.choice(files)
            if path.suffix == ".json" and rng.random() < 0.7:
                data = changed_json(contents[path], rng)
            else:
                *_, data = mutations([contents[path]], 1, seed=rng.randrange(2**31))
            _spoil(path, data, rng.choice(("change",) * 6 + ("remove", "folder", "loop", "empty")))
            survives(lambda: load_bundle(there, place=np.asarray), (path.name, data[:1000]))
            survives(lambda: read_spec(there), (path.name, data[:1000]))
            _remove(path)
            path.write_bytes(contents[path])


def _spoil(path: Path, data: bytes, how: str) -> None:
    path.unlink()
    match how:
        case "change":
            path.write_bytes(data)
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "empty":
            path.touch()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
