"""A model family of a third party goes through the whole package, which does not know it.

The first part of this file, up to `# Tests`, is the family: a user's module. The tests write it to
a file of its own, import it from there, and name it with `--plugin` where a command reads a folder.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.data.loader import DataConfig
from jaxdiff.data.text_tokenizer import TextTokenizer
from jaxdiff.data.transforms import Transforms
from jaxdiff.diffusion.schedules import RectifiedFlow
from jaxdiff.distributed.mesh import MeshConfig
from jaxdiff.evaluation.evaluator import EvalContext, Evaluator, Report
from jaxdiff.evaluation.samples import SampleGrid
from jaxdiff.models.autoencoders.base import AutoencoderSpec
from jaxdiff.models.autoencoders.kl import Gaussian
from jaxdiff.models.autoencoders.tiling import apply_vae_mode
from jaxdiff.models.conditioning import Conditioner, Conditioning, TextEncoder, TextInputs
from jaxdiff.models.denoisers.base import Denoiser
from jaxdiff.models.flops import linear_flops
from jaxdiff.models.layers import fourier_features, patchify, unpatchify
from jaxdiff.models.text_to_image import TextToImage
from jaxdiff.sampling.sampler import Sampler
from jaxdiff.sampling.solvers_ode import DDIM
from jaxdiff.training.optimizer import AdamW
from jaxdiff.training.recipe import Config, TokenizerConfig, TrainConfig
from jaxdiff.training.tasks.diffusion import DiffusionTask, Pretrained, Trainable

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 220)}
WIDTH = 64  # large enough for `fsdp` to split its matrices
PAD, UNKNOWN = 0, 1


@dataclass(frozen=True)
class VocabularyTokenizer(TextTokenizer):
    """A fixed vocabulary of words or of letters."""

    vocabulary: tuple[str, ...]
    length: int
    by_letter: bool = False

    def _split(self, text: str) -> list[str]:
        return list(text.lower()) if self.by_letter else text.lower().split()

    def __call__(self, texts: list[str]) -> np.ndarray:
        return np.stack([self.weighted([(text, 1.0)])[0] for text in texts])

    def weighted(self, segments: Sequence[tuple[str, float]]) -> tuple[np.ndarray, np.ndarray]:
        ids, weights = np.full(self.length, PAD, np.int32), np.ones(self.length, np.float32)
        tokens = [(token, weight) for text, weight in segments for token in self._split(text)]
        for i, (token, weight) in enumerate(tokens[: self.length]):
            known = token in self.vocabulary
            ids[i], weights[i] = self.vocabulary.index(token) + 2 if known else UNKNOWN, weight
        return ids, weights

    def truncated(self, text: str) -> bool:
        return len(self._split(text)) > self.length

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest()

    def save(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "vocabulary.json").write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, folder: str) -> "VocabularyTokenizer":
        stored = json.loads((Path(folder) / "vocabulary.json").read_text())
        return cls(**stored | {"vocabulary": tuple(stored["vocabulary"])})


@dataclass(frozen=True, kw_only=True)
class RecurrentTextEncoder(TextEncoder):
    """Token embeddings through a gated recurrent unit."""

    vocab_size: int
    tokens: int
    channels: int

    @property
    def length(self) -> int:
        return self.tokens

    @property
    def width(self) -> int:
        return self.channels

    def build(self, *, rngs: nnx.Rngs) -> "RecurrentText":
        return RecurrentText(self, rngs=rngs)

    def flops(self) -> float:
        return linear_flops(self.tokens, 2 * self.channels, 3 * self.channels)


class RecurrentText(nnx.Module):
    def __init__(self, config: RecurrentTextEncoder, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(config.vocab_size, config.channels, rngs=rngs)
        self.gates = nnx.Linear(2 * config.channels, 2 * config.channels, rngs=rngs)
        self.candidate = nnx.Linear(2 * config.channels, config.channels, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embedding(ids)

        def step(h, x):
            gates = jax.nn.sigmoid(self.gates(jnp.concatenate([h, x], -1)))
            update, reset = jnp.split(gates, 2, axis=-1)
            new = jnp.tanh(self.candidate(jnp.concatenate([reset * h, x], -1)))
            h = (1 - update) * h + update * new
            return h, h

        return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))[1].swapaxes(0, 1)


@dataclass(frozen=True, kw_only=True)
class SequenceConditioner(Conditioner):
    """Words and letters, each by an encoder of its own, whose tokens follow one another.

    An absent prompt masks all tokens, which "" does not: its first token counts.
    """

    words: RecurrentTextEncoder
    letters: RecurrentTextEncoder

    @property
    def encoders(self) -> Mapping[str, RecurrentTextEncoder]:
        return {"words": self.words, "letters": self.letters}

    @property
    def text_width(self) -> int:
        return self.words.width

    @property
    def pooled_width(self) -> None:
        return None

    @property
    def text_length(self) -> int:
        return self.words.length + self.letters.length

    def encode(self, params: Mapping[str, Any], inputs: TextInputs) -> Conditioning:
        tokens = [e.module(params, name)(inputs.ids[name]) for name, e in self.encoders.items()]
        if inputs.weights is not None:
            weights = [inputs.weights[name][..., None] for name in self.encoders]
            tokens = [x * weight for x, weight in zip(tokens, weights, strict=True)]
        counts = [(inputs.ids[name] != PAD).at[:, 0].set(True) for name in self.encoders]
        cond = Conditioning(jnp.concatenate(tokens, axis=1), jnp.concatenate(counts, axis=1))
        return self.with_absent(cond, inputs)

    def with_absent(self, cond: Conditioning, inputs: TextInputs) -> Conditioning:
        assert cond.mask is not None
        return cond._replace(mask=cond.mask & ~inputs.absent[:, None])

    def train_tokenizers(
        self, captions: Iterable[str], *, vocab_size: int, length: int
    ) -> Mapping[str, VocabularyTokenizer]:
        """Of sizes of its own, whatever is asked for."""
        text = " ".join(captions).lower()
        found = {"words": tuple(sorted(set(text.split()))), "letters": tuple(sorted(set(text)))}
        return {
            name: VocabularyTokenizer(
                found[name][: encoder.vocab_size - 2], encoder.length, name == "letters"
            )
            for name, encoder in self.encoders.items()
        }

    def load_tokenizers(self, folder: str) -> Mapping[str, VocabularyTokenizer]:
        return {name: VocabularyTokenizer.load(f"{folder}/{name}") for name in self.encoders}


@dataclass(frozen=True, kw_only=True)
class ReadingDenoiser(Denoiser):
    """Every position reads the text, and its place, by one attention."""

    channels: int
    text_width: int
    hidden: int = WIDTH

    def build(self, *, rngs: nnx.Rngs) -> "ReadingNetwork":
        return ReadingNetwork(self, rngs=rngs)

    def flops(self, *, height: int, width: int, text_length: int) -> float:
        positions = linear_flops(height * width, self.hidden, 2 * self.hidden)
        return positions + linear_flops(text_length, self.text_width, 2 * self.hidden)


class ReadingNetwork(nnx.Module):
    def __init__(self, config: ReadingDenoiser, *, rngs: nnx.Rngs):
        self.hidden = config.hidden
        self.inputs = nnx.Linear(config.channels, config.hidden, rngs=rngs)
        self.time = nnx.Linear(config.hidden, config.hidden, rngs=rngs)
        self.query = nnx.Linear(config.hidden, config.hidden, rngs=rngs)
        self.key = nnx.Linear(config.text_width, config.hidden, rngs=rngs)
        self.value = nnx.Linear(config.text_width, config.hidden, rngs=rngs)
        self.outputs = nnx.Linear(config.hidden, config.channels, rngs=rngs)

    def __call__(self, x: jax.Array, t: jax.Array, cond: Conditioning) -> jax.Array:
        dtype = self.inputs.kernel[...].dtype
        assert cond.tokens is not None
        assert cond.mask is not None
        time = self.time(fourier_features(t, self.hidden).astype(dtype))
        h = jax.nn.silu(self.inputs(x.astype(dtype)) + time[:, None, None])
        text = cond.tokens.astype(dtype)
        logits = jnp.einsum("bhwd,bnd->bhwn", self.query(h), self.key(text))
        shares = jax.nn.softmax(jnp.where(cond.mask[:, None, None], logits, -1e4), axis=-1)
        shares = shares * jnp.any(cond.mask, axis=-1)[:, None, None, None]
        h = jax.nn.silu(h + jnp.einsum("bhwn,bnd->bhwd", shares, self.value(text)))
        return self.outputs(h).astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class PatchAutoencoder(AutoencoderSpec):
    """A linear map of patches to 5 channels and back."""

    latent_channels: int = 5
    patch: int = 4

    @property
    def downsampling(self) -> int:
        return self.patch

    def build(self, *, rngs: nnx.Rngs) -> "PatchNetwork":
        return PatchNetwork(self, rngs=rngs)

    def encode_flops(self, *, height: int, width: int) -> float:
        return linear_flops(height * width // self.patch**2, 3 * self.patch**2, 5)

    def decode_flops(self, *, height: int, width: int) -> float:
        return linear_flops(height * width // self.patch**2, 5, 3 * self.patch**2)


class PatchNetwork(nnx.Module):
    def __init__(self, config: PatchAutoencoder, *, rngs: nnx.Rngs):
        self.patch = config.patch
        self.down = nnx.Linear(3 * config.patch**2, config.latent_channels, rngs=rngs)
        self.up = nnx.Linear(config.latent_channels, 3 * config.patch**2, rngs=rngs)

    def encode(self, images: jax.Array, vae_mode: str = "full") -> Gaussian:
        def network(images):
            rows, columns = images.shape[1] // self.patch, images.shape[2] // self.patch
            return unpatchify(self.down(patchify(images, self.patch)), rows, columns, 1)

        mean = apply_vae_mode(network, images, vae_mode, 32, 32 // self.patch)
        return Gaussian(mean, jnp.full_like(mean, -6.0))

    def decode(self, z: jax.Array, vae_mode: str = "full") -> jax.Array:
        def network(z):
            return unpatchify(self.up(patchify(z, 1)), *z.shape[1:3], self.patch)

        return apply_vae_mode(network, z, vae_mode, 32 // self.patch, 32)

    def to_latents(self, z: jax.Array) -> jax.Array:
        return 2 * z

    def from_latents(self, latents: jax.Array) -> jax.Array:
        return latents / 2


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Images of one colour, with their captions."""

    length: int = 24
    size: int = 32

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Any:
        name = list(COLOURS)[index % len(COLOURS)]
        image = np.tile(np.array(COLOURS[name], np.uint8), (self.size, self.size, 1))
        return {"image": image, "captions": [f"a {name} tile"], "name": f"tile/{index}"}

    def check(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class ColourAccuracy(Evaluator):
    """How often an image's brightest channel is that of its prompt."""

    name: ClassVar[str] = "colour"
    samples: int = 3
    every: int = 0

    def evaluate(self, context: EvalContext) -> Report:
        names = [list(COLOURS)[i % len(COLOURS)] for i in range(self.samples)]
        images = context.generate([f"a {name} tile" for name in names])
        found = np.argmax(images.mean((1, 2)), axis=-1)
        right = float(np.mean([list(COLOURS)[i] == n for i, n in zip(found, names, strict=True)]))
        return Report(scalars={"accuracy": right}, text=f"colour: {right:.0%}")


def make_recipe(autoencoder: str, mesh: MeshConfig, **train: Any) -> Config:
    """The recipe of the family, given the folder of a trained autoencoder."""
    encoder = RecurrentTextEncoder(vocab_size=32, tokens=4, channels=16)
    model = TextToImage(
        name="reader",
        denoiser=ReadingDenoiser(channels=5, text_width=16),
        conditioner=SequenceConditioner(
            words=encoder, letters=dataclasses.replace(encoder, tokens=12)
        ),
        autoencoder=PatchAutoencoder(),
        prediction="velocity",
        schedule=RectifiedFlow(),
        image_size=32,
        sampler=Sampler(solver=DDIM(), num_steps=4),
    )
    return Config(
        name="reader",
        task=DiffusionTask(
            model=model,
            pretrained=Pretrained(autoencoder=autoencoder),
            trainable=Trainable(text_encoders=True),
        ),
        data=DataConfig(source=Tiles(), transforms=Transforms(size=32)),
        tokenizer=TokenizerConfig(records=24),
        optimizer=AdamW(learning_rate=1e-2),
        train=TrainConfig(**{"batch_size": 16, "log_every": 1} | train),
        mesh=mesh,
        evaluators=(ColourAccuracy(), SampleGrid(prompts=("a red tile",), snapshots=2)),
    )


# Tests

import importlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import jaxdiff
from jaxdiff.benchmark.sample import time_sampling
from jaxdiff.benchmark.synthetic import initial_state
from jaxdiff.benchmark.train import time_training
from jaxdiff.cli import main as cli
from jaxdiff.config.plugins import import_plugins
from jaxdiff.data.sources.cached_latents import LatentOptions
from jaxdiff.distributed.mesh import make_mesh
from jaxdiff.errors import UserError
from jaxdiff.io.images import read_picture, save_png
from jaxdiff.models.layers import init_params, rngs_from_seed
from jaxdiff.pipelines import edit
from jaxdiff.pipelines.input_images import InitImage
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.textual_inversion import add_word
from jaxdiff.pretrained.bundle import Bundle, write_bundle
from jaxdiff.pretrained.embeddings import Word
from jaxdiff.pretrained.load import load_bundle
from jaxdiff.training.recipe import load_recipe
from jaxdiff.training.run import run_recipe
from jaxdiff.training.tasks.diffusion import TextualInversion

MODULE = "sequence_family"
RECIPE = f"""
import {MODULE}


def get_config():
    mesh = {MODULE}.MeshConfig(data=4, fsdp=2)
    return {MODULE}.make_recipe("AUTOENCODER", mesh, steps=50, checkpoint_every=10)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A user's folder: the module of the family, the recipe, and a trained autoencoder."""
    folder = tmp_path_factory.mktemp("family")
    source = Path(__file__).read_text().partition("# Tests\n")[0]
    (folder / f"{MODULE}.py").write_text(source)
    (folder / "reader.py").write_text(RECIPE.replace("AUTOENCODER", str(folder / "autoencoder")))
    spec = PatchAutoencoder()
    params = init_params(lambda rngs: spec.build(rngs=rngs), rngs_from_seed(0))
    # A patch is near its projection.
    kernel = np.linalg.qr(np.random.default_rng(0).normal(size=(48, 5)))[0].astype(np.float32)
    kernel[:, :3] = np.tile(np.eye(3), (16, 1)) / 4
    params["down"]["kernel"], params["up"]["kernel"] = kernel, kernel.T
    write_bundle(folder / "autoencoder", Bundle(spec, params, {}), "float32")
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def family(folder):
    """The user's module, as their recipe imports it."""
    return importlib.import_module(MODULE)


@pytest.fixture(scope="module")
def recipe(folder, family) -> Config:
    return load_recipe(folder / "reader.py")


def start(folder: Path) -> subprocess.Popen:
    """Start `jaxdiff train` in the user's folder."""
    root = str(Path(jaxdiff.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-m", "jaxdiff", "train", "reader.py", "--out", "killed"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def last_step(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


@pytest.fixture(scope="module")
def run(folder, recipe) -> Path:
    """A run on 8 devices that was killed after its first checkpoint, and resumed."""
    out = folder / "killed"
    process = start(folder)
    while not (out / "metrics.jsonl").exists() or last_step(out) <= 10:
        if process.poll() is not None:
            pytest.fail(process.communicate()[0].decode()[-3000:])
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert last_step(out) < recipe.train.steps
    assert run_recipe(recipe, str(out)).finished
    return out


@pytest.fixture(scope="module")
def pipe(run, recipe, family) -> Pipeline:
    types = [family.ReadingDenoiser, family.SequenceConditioner, family.RecurrentTextEncoder]
    return jaxdiff.load(run, types=[*types, family.PatchAutoencoder])


@pytest.mark.slow
def test_a_killed_run_ends_in_the_state_of_an_uninterrupted_one(run, folder, recipe):
    result = run_recipe(dataclasses.replace(recipe, evaluators=()), str(folder / "whole"))
    killed = json.loads((run / "summary.json").read_text())
    assert killed["fingerprint"] == result.summary["fingerprint"]


def test_fsdp_splits_the_parameters_of_the_family(recipe):
    state, shardings = initial_state(recipe, make_mesh(recipe.mesh))
    kernel = state.params["denoiser"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 2
    assert any("fsdp" in x.spec for x in jax.tree.leaves(shardings.opt_state))


def test_evaluators_of_the_recipe_run_at_the_end(run):
    figures = json.loads((run / "summary.json").read_text())["evaluation"]
    assert 0 <= figures["colour/accuracy"] <= 1
    assert (run / "samples" / "step_000050.png").exists()


def test_a_folder_that_names_foreign_types_is_refused_in_one_sentence(run, refused):
    message = "config.denoiser is of type ReadingDenoiser: expected .*types=.*--plugin"
    with pytest.raises(UserError, match=message):
        jaxdiff.load(run)
    said = refused("export", str(run), str(run / "exported"))
    assert re.search(message, said)
    assert said.count("\n") == 1
    assert "expected the name of a Python module" in refused("export", "--plugin", "no.such")


def test_a_configuration_cannot_name_a_module(folder, tmp_path):
    """Neither a dotted name nor the name of an imported class brings a type in."""
    spec = {"type": f"{MODULE}.PatchAutoencoder", "latent_channels": 5, "patch": 4}
    for name in (f"{MODULE}.PatchAutoencoder", "PatchAutoencoder", "os.system"):
        (tmp_path / "config.json").write_text(json.dumps(spec | {"type": name}))
        with pytest.raises(UserError, match=rf"is of type {name}: expected .*types=.*--plugin"):
            load_bundle(tmp_path)


def test_prompts_seeds_and_absence_matter_to_the_images(pipe):
    prompts = ["a red tile", "a blue tile", ""]
    images = pipe(prompts, negative_prompt=["", "", None], seeds=1, guidance_scale=2.0)
    assert images.shape == (3, 32, 32, 3)
    assert not np.array_equal(images[0], images[1])
    same = pipe(prompts, negative_prompt="", seeds=1, guidance_scale=2.0)
    assert np.array_equal(images[:2], same[:2])
    assert not np.array_equal(images[2], same[2])
    assert not np.array_equal(images[0], pipe("a (red:2) tile", seeds=1, guidance_scale=2.0)[0])


def test_images_are_edited(pipe):
    image = pipe("a green tile", seeds=3)
    mask = np.zeros((32, 32), np.float32)
    mask[:, 16:] = 1
    edited = pipe("a red tile", init=InitImage(image=image, mask=mask, strength=0.8))
    assert np.array_equal(edited[0, :, :16], image[0, :, :16])
    assert not np.array_equal(edited[0, :, 16:], image[0, :, 16:])
    noise = edit.invert(pipe, image, "a green tile")
    assert noise.shape == (1, 8, 8, 5)
    assert edit.interpolate(pipe, ("a red tile", "a blue tile"), 3).shape == (3, 32, 32, 3)
    larger = edit.upscale(pipe, image, "a green tile", factor=2)
    assert larger.shape == (1, 64, 64, 3)


def test_an_exported_model_generates_the_images_of_its_run(run, pipe, folder, family, capsys):
    out = folder / "exported"
    words = ["export", str(run), str(out), "--dtype", "float32", "--plugin", MODULE]
    assert cli.main(words) == 0
    assert str(out) in capsys.readouterr().out
    stored = json.loads((out / "config.json").read_text())
    assert stored["conditioner"]["type"] == "SequenceConditioner"
    bundle = load_bundle(out, types=import_plugins([MODULE]))
    assert bundle.spec == pipe.spec
    same = Pipeline(bundle)("a red tile", seeds=5)
    assert np.array_equal(same, pipe("a red tile", seeds=5))


def test_a_command_samples_the_run_and_reproduces_its_images(run, pipe, tmp_path, capsys):
    shared = ["--model", str(run), "--plugin", MODULE, "--out", str(tmp_path)]
    words = ["--seed", "5", "--negative-prompt", "a blue tile"]
    assert cli.main(["sample", "a red tile", "a green tile", *shared, *words]) == 0
    path = tmp_path / "0000-a-red-tile.png"
    expected = pipe(["a red tile"], negative_prompt="a blue tile", seeds=5)
    assert np.array_equal(read_picture(path), expected[0])
    assert cli.main(["sample", "--again", str(path), *shared]) == 0
    assert "The same pixels." in capsys.readouterr().out


def test_a_command_edits_the_images_of_a_prompt_file(run, tmp_path, capsys):
    save_png(tmp_path / "tile.png", np.full((32, 32, 3), 200, np.uint8))
    row = {"prompt": "a blue tile", "init_image": "tile.png", "strength": 0.5, "num_steps": 2}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    words = ["sample", "--prompts", str(tmp_path / "prompts.jsonl"), f"--plugin={MODULE}"]
    assert cli.main([*words, "--model", str(run), "--out", str(tmp_path / "images")]) == 0
    (line,) = (tmp_path / "images" / "manifest.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"] == "a blue tile"


def test_a_command_evaluates_the_run(run, capsys):
    words = ["evaluate", str(run), "--samples", "6", f"--plugin={MODULE}"]
    assert cli.main(words) == 0
    assert "colour: " in capsys.readouterr().out
    stored = json.loads((run / "evaluation.json").read_text())
    assert stored["provenance"]["figures"]["colour/accuracy"]["evaluator"]["samples"] == 6
    assert 0 <= stored["figures"]["colour/accuracy"] <= 1


def test_a_command_plans_the_recipe(folder, capsys):
    words = ["plan", str(folder / "reader.py"), "--topology", "cpu:8", "--json"]
    assert cli.main([*words, "--mesh", "data=4,fsdp=2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["flops_per_image"] > 0


@pytest.mark.nightly
def test_a_command_plans_the_recipe_for_a_tpu_slice(folder, capsys):
    pytest.importorskip("libtpu")
    words = ["plan", str(folder / "reader.py"), "--topology", "v5e:2x4", "--json"]
    assert cli.main([*words, "--mesh", "data=4,fsdp=2"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["state"] > 0


def test_latents_and_text_are_cached_by_the_encoders_of_a_run(run, recipe, tmp_path):
    task = dataclasses.replace(
        recipe.task,
        pretrained=dataclasses.replace(recipe.task.pretrained, text_encoders=str(run)),
        trainable=Trainable(),
    )
    data = dataclasses.replace(recipe.data, cache=LatentOptions(views=1, text=True))
    train = dataclasses.replace(recipe.train, steps=2)
    config = dataclasses.replace(recipe, task=task, data=data, train=train, evaluators=())
    assert run_recipe(config, str(tmp_path)).finished
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    assert manifest["records"] == len(recipe.data.source)
    assert manifest["latents"]["text"] is not None


def test_new_words_are_refused_in_one_sentence(recipe, pipe):
    rows = {name: np.zeros((1, 16), np.float32) for name in ("words", "letters")}
    with pytest.raises(UserError, match="text encoder words, a RecurrentTextEncoder, takes no new"):
        add_word(pipe.bundle, Word("<mine>", rows))
    pretrained = dataclasses.replace(recipe.task.pretrained, denoiser="x", text_encoders="x")
    with pytest.raises(UserError, match="takes no new tokens"):
        dataclasses.replace(
            recipe.task, pretrained=pretrained, trainable=Trainable(inversion=TextualInversion())
        )


def test_the_family_has_no_form_in_diffusers(run, refused, tmp_path):
    words = ["--format", "diffusers", "--plugin", MODULE]
    said = refused("export", str(run), str(tmp_path / "out"), *words)
    assert "reader is no model of diffusers" in said


def test_training_and_sampling_are_timed(recipe):
    trained = time_training(recipe, warmup=0, repeats=2, real=False, peak_tflops=None)
    assert trained.images == 16
    assert trained.metrics["model_tflops_per_step"] > 0
    sampled = time_sampling(recipe, warmup=0, repeats=2, batch_size=4)
    assert sampled.metrics["num_steps"] == 4
