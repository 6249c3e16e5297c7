"""The command `jaxdiff prepare`: images and captions, or their latents, as ArrayRecord shards."""

from dataclasses import dataclass
from typing import Annotated

import tyro
from etils import epath

from jaxdiff.cli.parsing import NO_PREFIX, parse, read_recipe
from jaxdiff.data.files import files_below
from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.array_record import ArrayRecord
from jaxdiff.data.sources.folder import ImageFolder, is_image
from jaxdiff.data.sources.parquet import Parquet
from jaxdiff.data.sources.prior_preservation import Source
from jaxdiff.data.sources.tfds import TFDS
from jaxdiff.data.sources.webdataset import WebDataset
from jaxdiff.data.transforms import Transforms
from jaxdiff.errors import UserError
from jaxdiff.training.prepare_shards import Sharing, write_records
from jaxdiff.training.recipe import Config


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(Sharing):
    """Writes records, or their latents, as ArrayRecord shards: fast to read at random.

    A recipe's file comes first, then the folder to write, then keys of the recipe to change; or, in
    the recipe's place, a folder of images, Parquet files or tars. Records that could not be
    trained on are left out, and named in the manifest. What was stopped goes on with the same
    command.
    """

    config: Annotated[Config, NO_PREFIX, tyro.conf.FlagConversionOff]
    out: Annotated[str | None, tyro.conf.Positional] = None
    """Folder to write, local or gs://."""


@dataclass(frozen=True, kw_only=True)
class PreparePathOptions(Sharing):
    """Writes images and their captions as ArrayRecord shards: fast to read at random.

    What holds them comes first, then the folder to write. Records that could not be trained on are
    left out, and named in the manifest. What was stopped goes on with the same command.
    """

    data: Annotated[DataConfig, tyro.conf.FlagConversionOff]
    out: Annotated[str | None, tyro.conf.Positional] = None
    """Folder to write, local or gs://."""


def prepare_command(arguments: list[str]) -> None:
    """`jaxdiff prepare RECIPE_OR_SOURCE OUT [--shards N] [--latents.views N] [--data.KEY V]`."""
    words = {"prog": "jaxdiff prepare"}
    if arguments and not arguments[0].startswith("-") and not arguments[0].endswith(".py"):
        data = DataConfig(source=source_at(arguments[0]), transforms=Transforms(size=256))
        plain = PreparePathOptions(data=data)
        path = parse(PreparePathOptions, arguments[1:], default=plain, **words)
        if path.latents.views or path.latents.text:
            raise UserError(
                "Latents need a recipe, whose autoencoder makes them: give its file first, and the "
                f"data as --data.source.path {arguments[0]}."
            )
        manifest = write_records(None, path.data, _folder(path.out), path)
    else:
        config, rest = read_recipe(arguments)
        options = parse(PrepareOptions, rest, default=PrepareOptions(config=config), **words)
        config = options.config
        manifest = write_records(config, config.data, _folder(options.out), options)
    if manifest is None:
        print("This machine's share is written; the last one to finish writes the manifest.")
        return
    kind = "records" if manifest.latents is None else "records of latents"
    left = f", left out {manifest.rejected}" if manifest.rejected else ""
    print(f"Wrote {manifest.records} {kind} in {len(manifest.shards)} shards{left}.")


def _folder(out: str | None) -> str:
    if out is None:
        raise UserError("There is no folder to write: give it after the recipe.")
    return out


def source_at(path: str) -> Source:
    """The source that reads what lies at `path`, a file, a folder or a glob.

    Raises:
      UserError: there is nothing, or nothing known.
    """
    root = epath.Path(path)
    if root.is_dir():
        if (root / "dataset_info.json").exists():
            return TFDS(name=path)
        names = list(files_below(root))
    elif root.is_file() or any(sign in path for sign in "*?["):
        names = [path]
    else:
        raise UserError(
            f"There is nothing at {path}: expected a recipe, whose name ends in .py, or images "
            "with captions."
        )
    if any(name.endswith(".tar") for name in names):
        return WebDataset(path=path)
    if any(name.endswith(".parquet") for name in names):
        return Parquet(path=path)
    if any(".array_record" in name for name in names):
        return ArrayRecord(path=path)
    if root.is_dir() and any(map(is_image, names)):
        return ImageFolder(path=path)
    raise UserError(
        f"{path} holds nothing to prepare: expected a folder of images with captions, or Parquet, "
        "ArrayRecord or tar files."
    )
