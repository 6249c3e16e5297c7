import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save

from jaxdiff.pretrained.embeddings import read_embedding
from jaxdiff.pretrained.load import load_bundle, read_spec, read_tokenizers
from jaxdiff.pretrained.lora import read_lora
from jaxdiff.pretrained.run_folder import read_word
from jaxdiff.pretrained.safetensors_io import TensorFiles
from jaxdiff.pretrained.single_file import read_original_spec
from jaxdiff.training.workdir import find_recipe_of, open_run, read_config
from tests.fuzz.harness import SpoiltFolder, counts, guarded, mutations, survives

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
@counts(15, 2000)
def test_folders_of_models(kind, count, folder, models):
    model = SpoiltFolder(folder / "model", models[kind])
    with guarded(folder):
        for _ in range(count):
            with model.spoilt() as data:
                survives(lambda: load_bundle(model.path, place=np.asarray), data)
                survives(lambda: read_spec(model.path), data)
                survives(lambda: read_tokenizers(model.path), data)


@counts(8, 2000)
def test_folders_of_runs(count, folder, models, tiny_recipe):
    """What evaluating, exporting and resuming them read."""
    run = SpoiltFolder(folder / "run", models["run"])
    out, config = epath.Path(run.path), tiny_recipe(steps=1)
    with guarded(folder):
        for _ in range(count):
            with run.spoilt() as data:
                for read in (read_config, find_recipe_of, read_word):
                    survives(lambda read=read: read(out), data)
                survives(lambda: open_run(config, out, fresh=False, log=lambda _: None), data)
