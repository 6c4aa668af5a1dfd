"""Settings and fixtures of all tests: eight virtual CPU devices, to simulate several."""

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")  # each test compiles what it tests
# Most of a test's time goes into compiling. Without most optimizations, by XLA's older code
# generator for CPUs, where there still is one, and with a single thread for each program it takes
# far less; what the shell has is left out.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1"
)


def pytest_configure(config):
    """Import the checker first if annotations are checked (see tests/typechecker.py)."""
    if config.getoption("jaxtyping_packages"):
        import tests.typechecker  # noqa: F401


def pytest_collection_modifyitems(items):
    """Run the slowest files first, so that two processes finish at the same time."""
    folders = ("training", "devices", "benchmarks", "test_", "inference", "model")
    tests = Path(__file__).parent

    def place(item):
        name = item.path.relative_to(tests).as_posix()
        found = (at for at, start in enumerate(folders) if name.startswith(start))
        return next(found, len(folders))

    items.sort(key=place)


def pytest_collection_finish():
    """Collect garbage rarely: imported modules stay, and tracing leaves little garbage."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_sessionfinish():
    """Leave what there is to the operating system: pytest would collect garbage five times."""
    gc.freeze()


def with_every_trick():
    """A model small enough to differentiate in a test, with every trick but the next one's."""
    from nanogpt.config import GPTConfig

    return GPTConfig(
        vocab_size=100,
        num_layers=4,
        num_heads=2,
        width=32,
        mlp_width=64,
        mlp_only=(1,),
        windows=(8, 24),
        rotary_windows=(4, 16, 24),
        value_embeddings=2,
        bigram_buckets=128,
        key_offset=(0, 3),
        paired_heads=(3,),
        backout=1,
        skips=((0, 2),),
        logit_scale=0.8,
        logit_shift=2.0,
    )


def like_the_speedrun():
    """A model as small, with the tricks that only the speedrun has, in layers like its own."""
    from nanogpt.config import GPTConfig

    return GPTConfig(
        vocab_size=100,
        num_layers=6,
        num_heads=2,
        width=32,
        mlp_width=64,
        mlp_only=(2,),
        windows=(8, 24),
        rotary_windows=(4, 16, 24),
        value_embeddings=3,
        value_layers=(1, 4, 5),
        bigram_buckets=128,
        bigram_width=32,
        key_offset=(1, 5),
        paired_heads=(0, 3),
        exclusive=(1, 4),
        gated=(1, 5),
        composed=(5,),
        composed_window=6,
        attention_gate=False,
        attention_init=0.5,
        attention_out_init=0.5,
        attention_source=3,
        dynamic=True,
        residual_init=1.1,
        skips=((1, 2),),
        logit_scale=0.8,
        logit_shift=2.0,
    )


@pytest.fixture
def tiny():
    """The configuration of a small model with nearly every trick."""
    return with_every_trick()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The cache folder, with the embedded corpus."""
    from tests.small_runs import shared_cache

    return shared_cache(tmp_path_factory)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A run of the embedded corpus."""
    from tests.small_runs import base_run

    return base_run(tmp_path_factory)


@pytest.fixture(scope="session")
def staged(tmp_path_factory):
    """A run of the speedrun in stages."""
    from tests.small_runs import staged_run

    return staged_run(tmp_path_factory)


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """The folder of the uninterrupted run, with which others are compared."""
    from tests.small_runs import straight_run

    return straight_run(tmp_path_factory)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with data to run in, also this process's working directory."""
    from tests.small_runs import write_data

    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def compiled_fully():
    """Compile with every optimization, for tests that read compiled programs."""
    import jax

    quickly = "jax_disable_most_optimizations"
    jax.config.update(quickly, False)
    yield
    jax.config.update(quickly, True)
