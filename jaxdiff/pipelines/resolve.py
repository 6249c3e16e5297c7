"""Resolve the settings of an image into the arguments of a pipeline."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from etils import epath

from jaxdiff.config.checked import checked
from jaxdiff.config.fields import LARGEST_SEED, fields_of
from jaxdiff.diffusion.time_grids import ConsistencyGrid, TrainStepGrid
from jaxdiff.errors import UserError
from jaxdiff.io import images as pictures
from jaxdiff.pipelines.input_images import check_reference_count, reference_size
from jaxdiff.pipelines.inputs import IMAGE_STRENGTH, check_size
from jaxdiff.pipelines.pipeline import Pipeline
from jaxdiff.pipelines.rerank import DEFAULT_CLIP
from jaxdiff.pipelines.settings import (
    LARGEST_SIDE,
    GenerationSettings,
    Varies,
    check_conflicts,
    with_requirements,
    without_no_ops,
)
from jaxdiff.sampling.feature_cache import FirstBlockCache, TaylorSeer
from jaxdiff.sampling.guidance.apg import APG
from jaxdiff.sampling.guidance.autoguidance import Autoguidance
from jaxdiff.sampling.guidance.cfg_zero import CFGZeroStar
from jaxdiff.sampling.guidance.clip_guidance import ClipGuidance
from jaxdiff.sampling.guidance.guidance import Guidance
from jaxdiff.sampling.sampler import ResolvedSampler, Sampler
from jaxdiff.sampling.solver import Solver
from jaxdiff.sampling.solvers import SOLVERS
from jaxdiff.sampling.solvers_ode import DDIM
from jaxdiff.sampling.solvers_sde import LCM

REFINER_START = 0.8

FILES = ("init_image", "mask", "reference")
"""Fields that name files."""

_INHERITED = (
    "seamless",
    "resample_steps",
    "guidance_interval",
    "guidance_rescale",
    "apg",
    "cfg_zero_star",
    "cache_interval",
    "cache_threshold",
)
"""Fields that become None where they equal those of the model's sampler."""


def input_paths(settings: GenerationSettings, name: str) -> tuple[epath.Path, ...]:
    """Return the files that a field of `FILES` names."""
    value = getattr(settings, name)
    return value if isinstance(value, tuple) else () if value is None else (value,)


class InputFile(NamedTuple):
    """An initial image, a mask, or a reference image."""

    path: epath.Path
    sha256: str
    size: tuple[int, int]
    is_mask: bool = False

    def read(self) -> pictures.Picture | pictures.Mask:
        """Return its pixels.

        Raises:
          UserError: it is missing, or has changed.
        """
        data = pictures.read_image_file(self.path)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise UserError(f"{self.path} has changed since the start: start again.")
        return _decode(self.path, data, self.is_mask)


def open_input(path: epath.PathLike, is_mask: bool = False) -> InputFile:
    """Read an image, or a mask, for its digest and size.

    Raises:
      UserError: it cannot be read.
    """
    data = pictures.read_image_file(path)
    height, width = _decode(path, data, is_mask).shape[:2]
    digest = hashlib.sha256(data).hexdigest()
    return InputFile(epath.Path(path), digest, (width, height), is_mask)


def _decode(path: epath.PathLike, data: bytes, is_mask: bool) -> pictures.Picture | pictures.Mask:
    return (pictures.read_mask if is_mask else pictures.read_picture)(path, data)


@checked
@dataclass(frozen=True, kw_only=True)
class CommandDefaults:
    """Auxiliary models, which only the command line sets, not prompt files or clients.

    None is that of the model's sampler, if any, and then the package's CLIP.

    Attributes:
      clip_model: the CLIP of `clip_scale` and `best_of`.
      guide_model: the model of autoguidance.
      refiner_model: the model that takes over at `refiner_start`.
    """

    clip_model: str | None = None
    guide_model: str | None = None
    refiner_model: str | None = None

    def inherit(self, guidance: Guidance) -> "CommandDefaults":
        """Return these models, with those of a sampler's guidance in the place of None."""
        clip, guide = guidance.clip, guidance.guide
        return CommandDefaults(
            clip_model=self.clip_model or (clip.model if clip else DEFAULT_CLIP),
            guide_model=self.guide_model or (guide and guide.model),
            refiner_model=self.refiner_model,
        )


_NO_MODELS, _NO_DEFAULTS = CommandDefaults(), GenerationSettings()


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings:
    """The settings of one image; only the model's sampler is inherited.

    Attributes:
      settings: those that have an effect.
      sampler: derived from them; it overrides the model's.
      files: those that fields of `FILES` name, if any.
      clip_model: the CLIP of `best_of`.
      refiner_model: the model that takes over, if any.
    """

    settings: GenerationSettings
    sampler: Sampler = field(default_factory=Sampler)
    files: Mapping[str, tuple[InputFile, ...]] = field(default_factory=dict)
    clip_model: str = DEFAULT_CLIP
    refiner_model: str | None = None

    @property
    def prompt(self) -> str:
        """The prompt."""
        return self.settings.prompt

    @property
    def seed(self) -> int:
        """The seed."""
        assert self.settings.seed is not None
        return self.settings.seed

    @property
    def size(self) -> tuple[int, int]:
        """Width and height before upscaling."""
        assert isinstance(self.settings.size, tuple)
        return self.settings.size

    @property
    def final_size(self) -> tuple[int, int]:
        """Width and height of the file."""
        factor = self.settings.upscale or 1
        return self.size[0] * factor, self.size[1] * factor

    def group(self, level: Varies) -> tuple[object, ...]:
        """Return `GenerationSettings.group`, with what else decides the program.

        That is the sizes of the reference images, and whether the guidance scale is 1, or less,
        which some models take for 1.
        """
        scale = self.settings.guidance_scale
        guided = scale is not None and (scale > 1) - (scale < 1)
        sizes = (file.size for file in self.files.get("reference", ()))
        return *self.settings.group(level), guided, *sizes

    def replace(self, **changes: object) -> "ResolvedSettings":
        """Replace settings that do not affect the sampler."""
        settings = dataclasses.replace(self.settings, **changes)
        return dataclasses.replace(self, settings=settings)

    def copies(self, count: int) -> list["ResolvedSettings"]:
        """Return copies with ascending seeds, none used twice.

        Raises:
          UserError: a seed exceeds the largest.
        """
        tried = self.settings.best_of or 1
        last = LARGEST_SEED - count * tried + 1
        if self.seed > last:
            raise UserError(f"seed is {self.seed}: expected a number from 0 to {last}.")
        return [self.replace(seed=self.seed + i * tried) for i in range(count)]


def resolve_settings(
    own: GenerationSettings,
    pipe: Pipeline,
    command: CommandDefaults = _NO_MODELS,
    *,
    defaults: GenerationSettings = _NO_DEFAULTS,
    called: Callable[[str], str] = str,
    opened: Callable[[epath.Path, bool], InputFile] = open_input,
) -> ResolvedSettings:
    """Resolve the settings of an image: its own, then `defaults`, then the model's sampler.

    Args:
      own: settings of this image.
      pipe: to sample with.
      command: models of the command.
      defaults: settings of all images.
      called: maps a field to its name in messages.
      opened: `open_input`; may cache, since images may share files.

    Raises:
      UserError: settings that exclude each other or do not fit the model, or an image that cannot
        be read or is of another size than the result.
    """
    model = pipe.spec.sampler.resolve()
    asked = own.inherit(defaults)
    if asked.guide_scale is None and command.guide_model is not None:
        asked = dataclasses.replace(asked, guide_scale=Autoguidance.scale)
    kept = {"clip_scale": model.guidance.clip, "guide_scale": model.guidance.guide}
    asked = without_no_ops(asked, tuple(name for name, value in kept.items() if value is not None))
    command = command.inherit(model.guidance)
    if asked.guide_scale is not None and command.guide_model is None:
        raise UserError(
            f"{called('guide_scale')} has no effect without a guide model: give --guide-model."
        )
    if asked.refiner_start is None and command.refiner_model is not None:
        asked = dataclasses.replace(asked, refiner_start=REFINER_START)
    if asked.refiner_start is not None and command.refiner_model is None:
        raise UserError(
            f"{called('refiner_start')} has no effect without a refiner: give --refiner-model."
        )
    asked = with_requirements(asked, own, called)
    check_conflicts(asked, called)
    given = {name: input_paths(asked, name) for name in FILES}
    if given["reference"]:
        check_reference_count(len(given["reference"]), pipe.spec)
    files = {
        name: tuple(opened(path, name == "mask") for path in paths)
        for name, paths in given.items()
        if paths
    }
    asked = _with_defaults(asked, model, _size(asked, files, pipe, called))
    asked = _without_inherited(asked, pipe.spec.sampler, command)
    resolved = ResolvedSettings(
        settings=asked,
        sampler=_sampler(asked, model, command),
        files=files,
        clip_model=command.clip_model or DEFAULT_CLIP,
        refiner_model=command.refiner_model,
    )
    width, height = resolved.final_size
    if max(width, height) > LARGEST_SIDE:
        raise UserError(
            f"The image would be {width}x{height}: expected at most {LARGEST_SIDE} pixels a side."
        )
    assert asked.num_steps is not None
    merged = resolved.sampler.inherit(pipe.spec.sampler).resolve()
    merged.check_steps(asked.num_steps)
    return resolved


def _size(
    asked: GenerationSettings,
    files: Mapping[str, tuple[InputFile, ...]],
    pipe: Pipeline,
    called: Callable[[str], str],
) -> tuple[int, int]:
    size = pipe.size_of(asked.size) if isinstance(asked.size, str) else asked.size
    multiple = pipe.spec.size_multiple
    sizes = [file.size for file in files.get("init_image", ())]
    sizes += [reference_size(file.size, multiple).cropped for file in files.get("reference", ())]
    given = called("size")
    if size is None and "init_image" in files:
        given = f"{called('init_image')} {files['init_image'][0].path.name}"
    size = size or (sizes[0] if sizes else (pipe.image_size, pipe.image_size))
    for name, (file, *_) in files.items():
        if name != "reference" and file.size != size:
            raise UserError(
                f"The {'mask' if name == 'mask' else 'image'} {file.path.name} is "
                f"{file.size[0]}x{file.size[1]}, not {size[0]}x{size[1]} as the result: resize it, "
                "or set another size."
            )
    return check_size(size, pipe.spec, given)


def _with_defaults(
    asked: GenerationSettings, model: ResolvedSampler, size: tuple[int, int]
) -> GenerationSettings:
    """Fill in defaults that are always recorded."""
    varies = asked.variation is not None
    defaults = GenerationSettings(
        prompt=asked.prompt,
        seed=0,
        num_steps=model.num_steps,
        # Guidance would move a variation away from the image.
        guidance_scale=1.0 if varies else float(model.guidance_scale),
        solver=None if varies else _solver_name(model.solver),
        strength=(1.0 if asked.mask else IMAGE_STRENGTH)
        if asked.init_image and not varies
        else None,
    )
    return dataclasses.replace(asked.inherit(defaults), size=size)


def _solver_name(solver: Solver) -> str | None:
    """Return the name of a solver in `SOLVERS`; None for one with settings of its own."""
    return next((name for name, make in SOLVERS.items() if make() == solver), None)


def _without_inherited(
    asked: GenerationSettings, model: Sampler, command: CommandDefaults
) -> GenerationSettings:
    def merged(settings: GenerationSettings) -> ResolvedSampler:
        return _sampler(settings, model.resolve(), command).inherit(model).resolve()

    for name in _INHERITED:
        if getattr(asked, name) is not None:
            without = dataclasses.replace(asked, **{name: None})
            asked = without if merged(without) == merged(asked) else asked
    return asked


def _sampler(
    asked: GenerationSettings, model: ResolvedSampler, command: CommandDefaults
) -> Sampler:
    """Return a sampler of these settings; other fields are None, and inherit."""
    own, apg, zero, solver = model.guidance, None, None, None
    if asked.apg is not None:
        apg = dataclasses.replace(own.apg or APG(), eta=asked.apg)
    if asked.cfg_zero_star is not None:
        zero = own.cfg_zero_star or CFGZeroStar()
        zero = dataclasses.replace(zero, zero_steps=asked.cfg_zero_star)
    if asked.variation is not None:
        solver = DDIM()
    elif asked.solver is not None:
        solver = SOLVERS[asked.solver]()
    grid = None
    if isinstance(solver, LCM) and isinstance(model.grid, TrainStepGrid):
        # As LCMScheduler.from_config does for LCM-LoRA: the times that it was distilled on.
        grid = ConsistencyGrid(num_train_steps=model.grid.num_train_steps)
    guidance = Guidance(
        interval=asked.guidance_interval,
        rescale=asked.guidance_rescale,
        apg=apg,
        true_cfg_scale=asked.true_cfg_scale,
        cfg_zero_star=zero,
        clip=_clip(asked, command),
        guide=None
        if asked.guide_scale is None or command.guide_model is None
        else Autoguidance(model=command.guide_model, scale=asked.guide_scale),
    )
    cache = None
    if asked.cache_interval is not None:
        own_cache = model.cache if isinstance(model.cache, TaylorSeer) else TaylorSeer()
        cache = dataclasses.replace(own_cache, interval=asked.cache_interval)
    elif asked.cache_threshold is not None:
        cache = FirstBlockCache(threshold=asked.cache_threshold)
    return Sampler(
        solver=solver,
        grid=grid,
        cache=cache,
        resample_steps=asked.resample_steps,
        vae_mode=asked.vae_mode,  # type: ignore[arg-type]  # checked by its field
        wrap=None if asked.seamless is None else (asked.seamless, asked.seamless),
        guidance=guidance,
    )


def _clip(asked: GenerationSettings, command: CommandDefaults) -> ClipGuidance | None:
    if asked.clip_scale is None:
        return None
    return ClipGuidance(
        model=command.clip_model or DEFAULT_CLIP,
        scale=asked.clip_scale,
        interval=asked.clip_interval or (0.0, 1.0),
        cutouts=asked.clip_cutouts or 0,
    )


def recorded(resolved: ResolvedSettings) -> dict[str, object]:
    """Return the settings as JSON, without the prompt and the seed, files by their digest."""
    settings = resolved.settings.to_json()
    for name, files in resolved.files.items():
        stated = [{"file": file.path.name, "sha256": file.sha256} for file in files]
        settings[name] = stated if name == "reference" else stated[0]
    return {name: value for name, value in settings.items() if name not in NOT_RECORDED}


NOT_RECORDED = ("prompt", "seed", "name")
"""Fields that a record has elsewhere, and the file's name."""

assert {*FILES, *_INHERITED, *NOT_RECORDED} <= fields_of(GenerationSettings).keys()
