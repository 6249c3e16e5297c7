import dataclasses
import io
import pickle
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.core import naming

from jaxdiff.data.sources.tfds import TFDS
from jaxdiff.errors import UserError

FEATURES = tfds.features.FeaturesDict(
    {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=["pea", "ripe_tomato"]),
        "title": tfds.features.Text(),
        "captions": tfds.features.Sequence({"text": tfds.features.Text(), "score": np.int64}),
    }
)


def _png(value):
    png = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(png, "PNG")
    return png.getvalue()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The data set `toy`, as written by TensorFlow."""
    folder = tmp_path_factory.mktemp("tfds") / "toy" / "1.0.0"
    folder.mkdir(parents=True)
    writer = ArrayRecordWriter(
        str(folder / "toy-train.array_record-00000-of-00001"), "group_size:1"
    )
    for i in range(3):
        example = {
            "image": _png(i),
            "label": i % 2,
            "title": f"größe {i}",
            "captions": [{"text": f"one {i}", "score": 1}, {"text": f"two {i}", "score": 2}],
        }
        writer.write(FEATURES.serialize_example(FEATURES.encode_example(example)))
    writer.close()
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="toy", version="1.0.0", data_dir=str(folder), module_name="toy"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=FEATURES)
    info.set_file_format("array_record")
    template = naming.ShardedFileTemplate(
        dataset_name="toy", data_dir=folder, split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[3], num_bytes=1, filename_template=template
    )
    info.set_splits(tfds.core.SplitDict([split]))
    info.write_to_directory(folder)
    return folder


def test_images_stay_encoded_and_labels_become_captions(prepared):
    source = TFDS(name=str(prepared), caption="label", template="a photo of a {}")
    source.check()
    assert [source[i]["captions"] for i in range(3)] == [
        ["a photo of a pea"],
        ["a photo of a ripe tomato"],
        ["a photo of a pea"],
    ]
    assert [source[i]["image"] for i in range(3)] == [_png(i) for i in range(3)]
    assert source[2]["name"].endswith("train record 2")


def test_texts_and_sequences_of_texts_are_captions(prepared):
    assert TFDS(name=str(prepared), caption="title")[1]["captions"] == ["größe 1"]
    assert TFDS(name=str(prepared), caption="captions/text")[1]["captions"] == ["one 1", "two 1"]


def test_a_name_and_a_slice_find_the_same_records_without_tensorflow(prepared):
    source = TFDS(
        name="toy", data_dir=str(prepared.parent.parent), split="train[1:]", caption="title"
    )
    source.check()
    assert [source[i]["captions"] for i in range(len(source))] == [["größe 1"], ["größe 2"]]
    assert "tensorflow" not in sys.modules


def test_another_process_opens_its_own_files(prepared):
    source = TFDS(name=str(prepared), caption="title")
    _ = source[0]
    assert pickle.loads(pickle.dumps(source))[2] == source[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "Unknown split 'test'.*tfds build"),
        ({"name": "no_such_set"}, "Dataset no_such_set not found.*tfds build"),
        ({"caption": "titel"}, "did you mean 'title'"),
        ({"image": "title"}, "is not an image"),
        ({"caption": "captions/score"}, "neither text nor a class label"),
        ({"template": "a photo"}, "template 'a photo' must contain"),
        ({"split": "train[3:]"}, "cannot be read"),
    ],
)
def test_user_errors_are_reported(prepared, change, message):
    source = TFDS(name=str(prepared), caption="title")
    with pytest.raises(UserError, match=message):
        dataclasses.replace(source, **change).check()
