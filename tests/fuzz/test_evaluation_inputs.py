"""Statistics, figures and icon sets that are damaged are read or refused in one sentence."""

import io
import json
import random
import shutil

import numpy as np
import pytest
from etils import epath

from jaxdiff.cli.sweep import SavedFigures
from jaxdiff.datasets.icons.source import Iconify
from jaxdiff.evaluation.distances import Moments
from jaxdiff.evaluation.provenance import compare_figures
from jaxdiff.evaluation.statistics import (
    Statistics,
    moments_of_npz,
    read_npz,
    read_statistics,
    write_statistics,
)
from tests.datasets.icons.tiny import write_sets
from tests.fuzz.harness import changed_json, counts, guarded, mutations, survives


@counts(300, 100_000)
def test_archives_of_statistics_and_images(count, folder):
    corpus = []
    for arrays in (
        {"mu": np.zeros(3), "sigma": np.eye(3)},
        {"arr_0": np.zeros((2, 4, 4, 3), np.uint8)},
    ):
        for save in (np.savez, np.savez_compressed):
            data = io.BytesIO()
            save(data, **arrays)
            corpus.append(data.getvalue())
    file = folder / "a.npz"
    with guarded(folder):
        for data in mutations(corpus, count):
            file.write_bytes(data)
            survives(lambda: moments_of_npz(file, read_npz(file)), data)


@counts(300, 100_000)
def test_stored_statistics(count, folder):
    file = folder / "a.safetensors"
    statistics = Statistics(
        count=3,
        moments=Moments(np.zeros(2), np.eye(2)),
        features=np.zeros((3, 2), np.float32),
        network={"network": "x", "weights": "0"},
        data="d",
    )
    write_statistics(file, statistics)
    with guarded(folder):
        for data in mutations([file.read_bytes()], count):
            file.write_bytes(data)
            survives(lambda: read_statistics(file), data)


@counts(300, 100_000)
def test_figures_of_evaluations_and_sweeps(count, folder):
    figures = {"figures": {"fid": 1.5}, "provenance": {"figures": {"fid": {"images": 3}}}}
    points = {"settings": {"n": 1}, "points": [{"point": {"x": 1}, "figures": {"y": 2.0}}]}
    corpus, rng = [json.dumps(x).encode() for x in (figures, points)], random.Random(0)
    file, other = folder / "a.json", folder / "b.json"
    other.write_bytes(corpus[0])

    with guarded(folder):
        for i, data in enumerate(mutations(corpus, count)):
            changed = data if i % 2 else changed_json(rng.choice(corpus), rng)
            file.write_bytes(changed)
            survives(lambda: compare_figures(file, other), changed)
            survives(lambda: SavedFigures(epath.Path(file), {"n": 1}), changed)


@counts(100, 10_000)
def test_icon_sets(count, folder, tmp_path_factory):
    pytest.importorskip("resvg_py")
    packages = write_sets(tmp_path_factory.mktemp("packages"))
    shutil.copytree(packages, folder / "sets")
    files = sorted(
        path for path in (folder / "sets").rglob("*.json") if path.name != "package.json"
    )
    rng = random.Random(0)

    def read(size: int):
        source = Iconify(
            size=size, folder=str(folder / "sets"), cache=str(folder / "cache"), subset="things"
        )
        source.check()
        _ = [source[i] for i in range(len(source))]

    with guarded(folder):
        for _ in range(count):
            file = rng.choice(files)
            whole = file.read_bytes()
            data = changed_json(whole, rng)
            if rng.random() < 0.3:
                *_, data = mutations([whole], 1, seed=rng.randrange(2**31))
            file.write_bytes(data)
            survives(lambda: read(8), data)
            file.write_bytes(whole)
            shutil.rmtree(folder / "cache", ignore_errors=True)
