"""Prepared TensorFlow Datasets, with random access and without TensorFlow."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from etils import epath, epy

from jaxdiff.config.checked import checked
from jaxdiff.data.bad_records import NOT_TEXT, RecordError
from jaxdiff.data.sources.base import PickledFields, Record
from jaxdiff.data.sources.columns import check_column
from jaxdiff.errors import UserError

with epy.lazy_imports():  # only where its data are read
    import tensorflow_datasets as tfds


@checked
@dataclass(frozen=True, kw_only=True)
class TFDS(PickledFields):
    """One split of a data set that was prepared with `file_format=array_record`.

    `name` is a TFDS name (`coco_captions`, `oxford_flowers102:2.1.1`) in `data_dir`, or the folder
    of one prepared version. `split` may be a slice such as `train[:90%]`.

    `image` and `caption` are feature keys, with `/` between levels (`captions/text`). A caption is
    a text, a sequence of texts, or a class label, whose name, with underscores replaced by spaces,
    is inserted at `{}` in `template`.
    """

    name: str
    split: str = "train"
    data_dir: str | None = None
    image: str = "image"
    caption: str = "caption"
    template: str = "a photo of a {}"

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int, /) -> Record:
        name = f"{self.name} {self.split} record {index}"
        try:
            example = self._examples[index]
            captions = self._captions(_lookup(example, self.caption))
            image = _lookup(example, self.image)
        except UnicodeDecodeError as error:
            raise RecordError(f"its caption is not UTF-8 ({error})", NOT_TEXT, name) from error
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise RecordError(str(error), name=name) from error
        return {"image": image, "captions": captions, "name": name}

    def check(self) -> None:
        """Raise `UserError` if the data are missing, in another format, or lack the keys."""
        _ = self._examples  # opens the data; fails for an empty split
        if self.template.count("{}") != 1:
            raise UserError(
                f"The caption template {self.template!r} must contain {{}} once, for the label's "
                'name: set data.source.template to something like "a photo of a {}".'
            )

    @cached_property
    def _examples(self) -> Any:
        self._check_features()
        decoders: Any = tfds.decode.SkipDecoding()  # the transforms decode, with a size limit
        for key in reversed(self.image.split("/")):
            decoders = {key: decoders}
        try:
            return self._builder.as_data_source(self.split, decoders=decoders)
        except (OSError, RuntimeError, ValueError) as error:
            raise self._unreadable(error) from error

    @cached_property
    def _builder(self) -> Any:  # untyped, because of decorators
        try:
            if (epath.Path(self.name) / "dataset_info.json").exists():
                return tfds.builder_from_directory(self.name)
            return tfds.builder(self.name, data_dir=self.data_dir)
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> UserError:
        reason = str(error).strip().split("\n")[0].rstrip(".: ")
        return UserError(
            f"Split {self.split} of the TensorFlow data set {self.name} cannot be read "
            f"({reason}): prepare it with `tfds build --file_format=array_record`, and set "
            "data.source.data_dir to its folder."
        )

    @cached_property
    def _features(self) -> dict[str, Any]:
        return dict(_flat(self._builder.info.features))

    def _check_features(self) -> None:
        for key, value in (("image", self.image), ("caption", self.caption)):
            check_column(value, self._features, key=key, where=self.name)
        if not isinstance(self._features[self.image], tfds.features.Image):
            raise UserError(
                f"Feature {self.image!r} of {self.name} is not an image: "
                "data.source.image must name a feature of type Image."
            )
        if not isinstance(
            self._features[self.caption], tfds.features.Text | tfds.features.ClassLabel
        ):
            raise UserError(
                f"Feature {self.caption!r} of {self.name} is neither text nor a class label: "
                "data.source.caption must name such a feature."
            )

    def _captions(self, value: Any) -> list[str]:
        feature = self._features[self.caption]
        values = value if getattr(value, "ndim", 0) or isinstance(value, list) else [value]
        if isinstance(feature, tfds.features.ClassLabel):
            names = [feature.int2str(int(label)) for label in values]
            return [self.template.format(name.replace("_", " ")) for name in names]
        return [text.decode() for text in values]


def _lookup(example: Any, key: str) -> Any:
    for part in key.split("/"):
        example = example[part]
    return example


def _flat(feature: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a feature tree by key; a sequence counts as its element."""
    if isinstance(feature, tfds.features.Sequence):
        yield from _flat(feature.feature, prefix)
    elif isinstance(feature, tfds.features.FeaturesDict):
        for key, child in feature.items():
            yield from _flat(child, f"{prefix}/{key}" if prefix else key)
    else:
        yield prefix, feature
