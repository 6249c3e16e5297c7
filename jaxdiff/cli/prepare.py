"""`jaxdiff prepare`: write captioned images, or their latents, to ArrayRecord shards."""

from dataclasses import dataclass
from typing import Annotated

import tyro
from etils import epath

from jaxdiff.cli.parsing import NO_PREFIX, parse_flags
from jaxdiff.cli.recipe_flags import parse_recipe_flags
from jaxdiff.config.checked import checked
from jaxdiff.config.recipe_files import names_recipe
from jaxdiff.data.files import (
    is_image,
    is_packed_tar,
    is_regular,
    is_unsupported_image,
    list_files,
)
from jaxdiff.data.loader import DataConfig
from jaxdiff.data.sources.array_record import ArrayRecord
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.sources.metadata import is_metadata
from jaxdiff.data.sources.parquet import Parquet
from jaxdiff.data.sources.prior_preservation import AnySource
from jaxdiff.data.sources.tfds import TFDS
from jaxdiff.data.sources.webdataset import WebDataset
from jaxdiff.data.transforms import Transforms
from jaxdiff.errors import UserError
from jaxdiff.io.terminal import write_line
from jaxdiff.io.text import check_text
from jaxdiff.training.prepare_shards import Sharing, write_records
from jaxdiff.training.recipe import Config


@checked
@dataclass(frozen=True, kw_only=True)
class PrepareOptions(Sharing):
    """Write records, or their latents, to ArrayRecord shards, which have fast random access.

    Arguments: a recipe, the output folder, and recipe keys to change; or, instead of a recipe, a
    folder of images, Parquet files or tar files. Unusable records are left out and listed in the
    manifest. Repeat the command to continue after an interruption.
    """

    config: Annotated[Config, NO_PREFIX, tyro.conf.FlagConversionOff]
    out: Annotated[str | None, tyro.conf.Positional] = None
    """Output folder, local or gs://."""


@checked
@dataclass(frozen=True, kw_only=True)
class PreparePathOptions(Sharing):
    """Write captioned images to ArrayRecord shards, which have fast random access.

    Arguments: the images, and the output folder. Unusable records are left out and listed in the
    manifest. Repeat the command to continue after an interruption.
    """

    data: Annotated[DataConfig, tyro.conf.FlagConversionOff]
    out: Annotated[str | None, tyro.conf.Positional] = None
    """Output folder, local or gs://."""


def prepare_command(arguments: list[str]) -> None:
    """Run `jaxdiff prepare RECIPE_OR_SOURCE OUT [--shards N] [--latents.views N] ...`."""
    prog = "jaxdiff prepare"
    if arguments and not arguments[0].startswith("-") and not names_recipe(arguments[0]):
        data = DataConfig(source=source_at(arguments[0]), transforms=Transforms(size=256))
        plain = PreparePathOptions(data=data)
        path = parse_flags(PreparePathOptions, arguments[1:], default=plain, prog=prog)
        if path.latents.views or path.latents.text:
            raise UserError(
                "Latents need a recipe with an autoencoder: give its file first, and the data as "
                f"--data.source.path {arguments[0]}."
            )
        manifest = write_records(None, path.data, _folder(path.out), path)
    else:
        options = parse_recipe_flags(PrepareOptions, arguments, prog=prog)
        config = options.config
        manifest = write_records(config, config.data, _folder(options.out), options)
    if manifest is None:
        write_line("This host's shards are written; the last host to finish writes the manifest.")
        return
    kind = "" if manifest.latents is None else " as latents"
    count = len(manifest.shards)
    wrote = f"wrote {manifest.records}{kind} in {count} shard{'s' * (count != 1)}"
    write_line(manifest.account.text(wrote))


def _folder(out: str | None) -> str:
    if out is None:
        raise UserError("The output folder is missing: give it after the recipe.")
    check_text(out, "The output folder")
    return out


def source_at(path: str) -> AnySource:
    """Return the source that reads `path`, a file, a folder or a glob.

    Raises:
      UserError: it does not exist, or is of an unknown format.
    """
    check_text(path, "The path of the images")
    root = epath.Path(path)
    if root.is_dir():
        if (root / "dataset_info.json").exists():
            return TFDS(name=path)
        names = list_files(root).files
    elif is_regular(root) or any(sign in path for sign in "*?["):
        names = [path]
    else:
        raise UserError(
            f"{path} does not exist: expected a recipe, by its name or its Python file, or images "
            "with captions."
        )
    if any(name.lower().endswith(".tar") for name in names):
        return WebDataset(path=path)
    if any(name.lower().endswith(".parquet") and not is_metadata(name) for name in names):
        return Parquet(path=path)
    if any(".array_record" in name for name in names):
        return ArrayRecord(path=path)
    images = (is_image, is_unsupported_image, is_metadata)
    if root.is_dir() and any(test(name) for name in names for test in images):
        return ImageFolder(path=path)
    if any(map(is_packed_tar, names)):
        raise UserError(
            f"{path} is a compressed tar file, or contains one: expected uncompressed ones; unpack "
            "it, and prepare the folder."
        )
    raise UserError(
        f"{path} contains nothing to prepare: expected a folder of images with captions, or "
        "Parquet, ArrayRecord or uncompressed tar files."
    )
