"""Shape annotations are checked while the tests run; compilation is fast rather than thorough."""

import gc
import importlib.metadata
import os
import socket
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what the tests cost, and takes 0.6 of the time without LLVM's optimizations.
# Those that need the programs of users are marked `optimized`; "0" in the environment makes all so.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# What takes long to compile is compiled once for all workers of a run and the processes they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")  # removed at the end of the run
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.25")
# Without its newer way to make kernels, which later versions always take, XLA compiles for the CPU
# in half the time.
MAKES_KERNELS = "xla_cpu_use_fusion_emitters"
QUICK = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
JAXLIB = importlib.metadata.version("jaxlib")
PLAIN_KERNELS = QUICK and JAXLIB.startswith("0.10.")
# Eight simulated devices, for the tests of sharding; the others use the first.
FLAGS = {"xla_force_host_platform_device_count": 8}
if PLAIN_KERNELS:
    FLAGS[MAKES_KERNELS] = 0
# A worker's share of the cores is one, where code made in 32 parts takes a quarter longer. XLA ends
# the process at a flag that it does not know.
if JAXLIB.startswith(("0.10.", "0.11.", "0.12.")):
    FLAGS["xla_cpu_parallel_codegen_split_count"] = 1
for flag, value in FLAGS.items():
    said = os.environ.get("XLA_FLAGS", "")
    if flag not in said:
        os.environ["XLA_FLAGS"] = f"{said} --{flag}={value}".strip()

# Traces are many small objects that live on: looking for garbage after every 700 of them took a
# seventh of the time.
gc.set_threshold(50_000, 20, 20)

from jaxtyping import install_import_hook

# An int is a float to users, pyright and PEP 484, but not to beartype by default.
install_import_hook(
    "jaxdiff", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

from collections.abc import Callable

import jax
import pytest

RECIPE = """
from jaxdiff.training.recipe import Config
from jaxdiff.data.sources.folder import ImageFolder
from jaxdiff.data.loader import DataConfig
from jaxdiff.datasets.produce.source import Produce
from jaxdiff.data.transforms import Transforms
from jaxdiff.models.autoencoders.kl import AutoencoderConfig
from jaxdiff.training.tasks.autoencoder import AutoencoderTask


def get_config():
    return Config(
        name="tiny",
        task=AutoencoderTask(model=AutoencoderConfig()),
        data=DataConfig(source={source}, transforms=Transforms(size=32)),
    )
"""


def pytest_collection_modifyitems(items):
    """Tests marked `nightly` are skipped unless JAXDIFF_NIGHTLY=1."""
    if os.environ.get("JAXDIFF_NIGHTLY") != "1":
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(pytest.mark.skip(reason="set JAXDIFF_NIGHTLY=1"))


@pytest.fixture(scope="session")
def tiny_spec():
    """The smallest text-to-image model."""
    from jaxdiff.diffusion.schedules import RectifiedFlow
    from jaxdiff.models.conditioning import ClipConditioner, ClipTextEncoder
    from jaxdiff.models.denoisers.dit import DiTConfig
    from jaxdiff.models.text_encoders.clip import ClipTextConfig
    from jaxdiff.models.text_to_image import TextToImage
    from jaxdiff.sampling.sampler import Sampler
    from jaxdiff.sampling.solvers_ode import DDIM

    text = ClipTextConfig(vocab_size=600, length=16, width=16, depth=1, heads=2)
    return TextToImage(
        name="tiny",
        denoiser=DiTConfig(
            patch_size=8, width=32, depth=2, heads=2, text_width=16, pooled_width=16
        ),
        conditioner=ClipConditioner(text=ClipTextEncoder(model=text)),
        prediction="x0",
        schedule=RectifiedFlow(),
        image_size=32,
        sampler=Sampler(solver=DDIM(), num_steps=3),
    )


@pytest.fixture(scope="session")
def tiny_recipe(tiny_spec) -> Callable:
    """`tiny_recipe(steps=6)`: the smallest diffusion recipe, with these keys of `train`."""
    from jaxdiff.data.loader import DataConfig
    from jaxdiff.data.transforms import Transforms
    from jaxdiff.datasets.produce.source import Produce
    from jaxdiff.diffusion.curriculum import NoiseCurriculum
    from jaxdiff.diffusion.objectives import Denoising
    from jaxdiff.training.optimizer import AdamW
    from jaxdiff.training.recipe import Config, TokenizerConfig, TrainConfig
    from jaxdiff.training.tasks.diffusion import DiffusionTask, Trainable

    task = DiffusionTask(
        model=tiny_spec,
        trainable=Trainable(text_encoders=True),
        objective=Denoising(loss_space="velocity"),
        curriculum=NoiseCurriculum(steps_per_level=2),
    )

    def make(**train) -> Config:
        settings = {"steps": 6, "batch_size": 8, "checkpoint_every": 2, "log_every": 1} | train
        return Config(
            name="tiny",
            task=task,
            data=DataConfig(source=Produce(size=32, length=200), transforms=Transforms(size=32)),
            tokenizer=TokenizerConfig(vocab_size=600, length=16, records=50),
            optimizer=AdamW(learning_rate=1e-2),
            train=TrainConfig(**settings),
        )

    return make


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """What is marked `optimized` compiles as users compile, and takes nothing over from others."""
    quick = QUICK and item.get_closest_marker("optimized") is None
    if quick != jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", quick)
        if PLAIN_KERNELS:
            compile_with_kernels(not quick)


def compile_with_kernels(yes: bool):
    """Has what follows compiled with XLA's newer kernels, or without; of a known JAX alone."""
    from jax._src import compiler  # where alone a flag can be changed after the start

    plainly = getattr(compiler.get_compile_options, "plainly", compiler.get_compile_options)

    def options(*args, **kwargs):
        found = plainly(*args, **kwargs)
        found.env_option_overrides = [*found.env_option_overrides, (MAKES_KERNELS, yes)]
        return found

    options.plainly = plainly
    compiler.get_compile_options = options


@pytest.fixture(scope="session")
def tiny_bundle(tiny_spec):
    """The tiny model with random weights: prompt, seed and time all matter to it."""
    import numpy as np

    from jaxdiff.data.tokenizer import Tokenizer
    from jaxdiff.pretrained.bundle import Bundle

    rng = np.random.default_rng(0)

    def random(leaf):
        scale = leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.5
        return rng.normal(0, scale, leaf.shape).astype(np.float32)

    params = jax.tree.map(random, tiny_spec.abstract_params())
    captions = ["a small red pea", "a green tomato with a stem"]
    tokenizer = Tokenizer.train(captions, vocab_size=600, length=16)
    return Bundle(tiny_spec, params, {"text": tokenizer})


@pytest.fixture(scope="session")
def pipeline(tiny_bundle):
    """The pipeline of the tiny bundle."""
    from jaxdiff.pipelines.pipeline import Pipeline

    return Pipeline(tiny_bundle)


@pytest.fixture(scope="session")
def some_plan():
    """The plan of a run, its figures made up."""
    from jaxdiff.planning.plan import Memory, Plan

    return Plan(
        recipe="tiny",
        topology="cpu:8",
        quick=False,
        proxy_topology=None,
        chip="cpu",
        chips=8,
        mesh={},
        batch_size=16,
        accumulate=1,
        remat="none",
        steps=100,
        flags=(),
        parameters=1,
        frozen_parameters=0,
        flops_per_image=1.0,
        flops_per_step=16.0,
        memory=Memory(state=1.0, temporary=1.0, program=0.0),
        memory_needed=2.0,
        memory_limit=30.0,
        collectives=(),
        traffic=None,
        compute_s=1.0,
        memory_s=None,
        interconnect_s=0.0,
        network=0.0,
        network_s=0.0,
        exposed_s=0.0,
        step_s=1.0,
        utilisation=0.4,
        images_per_s=6.4,
        days=0.003,
        compile_s=1.0,
    )


@pytest.fixture
def jax_cache():
    """`jax_cache(path)`: the path; what the test sets of JAX's cache of programs ends with it."""
    from etils import epath
    from jax._src import compilation_cache

    names = [
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_enable_xla_caches",
    ]
    before, opened = (
        {name: getattr(jax.config, name) for name in names},
        compilation_cache.get_file_cache,
    )
    yield epath.Path
    compilation_cache.get_file_cache = opened
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def compilations():
    """Names of the functions that are compiled during the test."""
    names = []

    def listen(event, *_, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def recipe_of(tmp_path) -> Callable[[str], str]:
    """`recipe_of("ImageFolder(path='photos')")` writes a tiny recipe, and gives its path."""

    def write(source: str) -> str:
        path = tmp_path / "tiny.py"
        path.write_text(RECIPE.format(source=source))
        return str(path)

    return write


@pytest.fixture
def recipe(recipe_of) -> str:
    """The path of a tiny recipe of four records."""
    return recipe_of("Produce(size=32, length=4)")


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """`refused("trian")`: the one sentence that a command line ends in, with status 2."""
    from jaxdiff.cli import main as cli

    def run(*words: str) -> str:
        assert cli.main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        return captured.err

    return run


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """`free_port()`: one that nobody listens on."""

    def find() -> int:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return server.getsockname()[1]

    return find
