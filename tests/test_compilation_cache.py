"""A cut entry of the cache of compiled programs is replaced, not warned of at every start."""

from mimicnorm_jax.compilation_cache import delete_cut_entries
from tests.runs import Run


def test_a_cut_entry_is_replaced(tmp_path, tiny):
    cache = tmp_path / "cache"
    environment = {"JAX_COMPILATION_CACHE_DIR": str(cache)}

    def start(name):
        arguments = (*tiny[:-1], f"--workdir={tmp_path / name}", "--config.max_steps=2")
        with Run(tmp_path / f"{name}-output", *arguments, **environment) as run:
            run.succeeds()
            return run.errors()

    start("first")
    entries = {path: path.read_bytes() for path in cache.glob("*-cache")}
    assert entries and not delete_cut_entries(cache)  # whole ones stay
    step = max(entries, key=lambda path: len(entries[path]))  # which takes longest to compile
    step.write_bytes(entries[step][: len(entries[step]) // 2])
    assert f"NOTE: entries of {cache} that were cut are replaced: 1" in (said := start("second"))
    assert "Error reading persistent" not in said
    assert step.exists() and not delete_cut_entries(cache)
    assert "cut" not in start("third")


def test_what_another_environment_packed_stays(tmp_path):
    """It chooses by what is installed; its first bytes tell."""
    from jax._src.compilation_cache import compress_executable

    packed = compress_executable(b"a program" * 100)
    for name, content in {
        "jit_a-1-cache": packed,
        "jit_a-2-cache": packed[: len(packed) // 2],
        "jit_a-3-cache": b"",
        "jit_a-4-cache": b"of others",
        "jit_b-1-cache": packed[: len(packed) // 2],
    }.items():
        (tmp_path / name).write_bytes(content)
    assert delete_cut_entries(tmp_path, "jit_a") == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "jit_a-1-cache",
        "jit_a-4-cache",
        "jit_b-1-cache",
    }
