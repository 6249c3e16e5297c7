import io
import json
import tarfile

import numpy as np
import pytest
from etils import epath
from PIL import Image

from jaxdiff.benchmark.report import read_report
from jaxdiff.cli.generate.manifest import Manifest
from jaxdiff.cli.generate.prompt_file import read_prompts
from jaxdiff.data.shards import read_manifest
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.sources.webdataset import WebDataset
from jaxdiff.pipelines.image_metadata import ImageMetadata
from jaxdiff.pipelines.prompt_weights import parse_prompt, plain
from jaxdiff.training.metrics import MetricsWriter
from tests.fuzz.harness import PROMPT_FILES, counts, guarded, mutations, survives

PROMPTS = [
    text.encode()
    for text in (
        "a (red:1.2) pea",
        "(red:1.2)(pea:0.8)",
        "((a) [b] c)",
        r"\(a\) \[b\]",
        '"a cat":1 "rain":-0.5',
        "(((a:1.1):1.2):0.5)",
        "grün 豆 🫛",
    )
]


@pytest.mark.parametrize("kind", PROMPT_FILES)
@counts(300, 100_000)
def test_prompt_files(kind, count, folder):
    file = folder / f"p.{kind}"
    with guarded(folder):
        for data in mutations(list(PROMPT_FILES.values()), count):
            file.write_bytes(data)
            survives(lambda: read_prompts(file), data)


@counts(1000, 100_000)
def test_prompts_with_weights(count):
    for data in mutations(PROMPTS, count):
        text = data.decode(errors="surrogateescape")
        survives(lambda text=text: (parse_prompt(text), plain(text)), data)


@counts(300, 100_000)
def test_captions_and_metadata_of_a_folder(count, folder):
    (folder / "a.png").write_bytes(_png())
    (folder / "b.png").write_bytes(_png())
    corpus = [
        b'{"file_name": "a.png", "text": "a pea"}\n{"file_name": "b.png", "text": ["x", "y"]}\n',
        b"a pea\na pod\n",
        b'{"file_name": "a.png", "text": "x", "reference": ["b.png", "a.png"]}\n',
    ]
    with guarded(folder):
        for i, data in enumerate(mutations(corpus, count)):
            for name in ("metadata.jsonl", "a.txt"):
                (folder / name).unlink(missing_ok=True)
            (folder / ("metadata.jsonl" if i % 2 else "a.txt")).write_bytes(data)
            reference = "reference" if i % 4 == 1 else None
            source = ImageFolder(path=str(folder), reference=reference)
            survives(lambda source=source: _read_all(source), data)


@counts(300, 100_000)
def test_archives(count, folder):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, data in {"a.png": _png(), "a.txt": b"a pea", "b.png": _png()}.items():
            _add(tar, name, data)
        _add(tar, "b.json", b'{"caption": ["x", "y"]}')
    with guarded(folder):
        for data in mutations([archive.getvalue()], count):
            (folder / "a.tar").write_bytes(data)
            survives(lambda: _read_all(WebDataset(path=str(folder / "a.tar"))), data)


@counts(300, 100_000)
def test_metrics_of_an_interrupted_run(count, folder):
    corpus = [b'{"step": 1, "loss": 0.5, "by_level": [1, null]}\n{"step": 2, "loss": 0.25}\n']
    with guarded(folder):
        for data in mutations(corpus, count):
            (folder / "metrics.jsonl").write_bytes(data)

            def resume():
                with MetricsWriter(epath.Path(folder), resume_from=1):
                    pass

            survives(resume, data)


@counts(300, 100_000)
def test_manifests(count, folder):
    shards = {
        "provenance": {"source": None},
        "latents": None,
        "shards": [{"file": "a", "records": 2, "bytes": 10, "rejects": []}],
    }
    record = {"file": "0.png", "prompts": "p.txt", "row": 0, "seed": 1, "sha256": "0"}
    corpus = [json.dumps(shards).encode(), json.dumps(record).encode() + b"\n"]
    with guarded(folder):
        for data in mutations(corpus, count):
            (folder / "manifest.json").write_bytes(data)
            (folder / "manifest.jsonl").write_bytes(data)
            survives(lambda: read_manifest(epath.Path(folder)), data)
            survives(lambda: Manifest(epath.Path(folder), "p.txt", [record]), data)


@counts(300, 100_000)
def test_metadata_of_images_and_reports(count, folder):
    file = folder / "r.json"
    settings = {"num_steps": 4, "guidance_scale": 2.5, "size": "64x64"}
    found = {"sampler": {"type": "Sampler"}, "dtype": "float32"}
    text = {"prompt": "a pea", "seed": "1", "model": "m", "model_fingerprint": "f"}
    corpus = [json.dumps(settings).encode(), json.dumps(found).encode()]
    for data in mutations(corpus, count):
        changed = data.decode(errors="surrogateescape")
        survives(
            lambda c=changed: ImageMetadata.parse(
                "a.png", {**text, "settings": c, "details": json.dumps(found)}
            ),
            data,
        )
        file.write_bytes(data)
        survives(lambda: read_report(file), data)


def _png() -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(data, "PNG")
    return data.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _read_all(source) -> None:
    source.check()
    for i in range(len(source)):
        try:
            source[i]
        except Exception as error:
            if type(error).__name__ != "RecordError":
                raise
