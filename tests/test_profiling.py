import jax
import jax.numpy as jnp
import pytest

from dmd_jax.runtime import compilation_cache, profiling


def steps_of(directory):
    """The numbers of the steps in a trace, as jax's own reader finds them."""
    (path,) = directory.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    events = [
        event
        for plane in planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    return sorted({dict(event.stats)["step_num"] for event in events})


def test_the_steps_asked_for_are_traced(tmp_path):
    trace, step = profiling.Trace("2:3", tmp_path), jax.jit(jnp.sin)
    for number in range(1, 6):
        with trace.step(number):
            values = step(number)
        trace.finish(number, values)
    assert steps_of(tmp_path) == [2, 3]


def test_without_steps_there_is_no_trace(tmp_path):
    trace = profiling.Trace(None, tmp_path)
    with trace.step(1):
        pass
    trace.finish(1, ())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", ["", "5", "5:3", "0:2", "1:2:3", "a:b", "-1:2"])
def test_steps_that_are_none(steps):
    with pytest.raises(
        ValueError, match=f"profile is {steps!r}, expected the first and the last step"
    ):
        profiling.parse(steps)


def test_programs_are_kept_by_the_kind_of_processor_unless_the_environment_says_where(
    tmp_path, monkeypatch
):
    before = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    monkeypatch.setattr(compilation_cache, "DIRECTORY", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    compilation_cache.keep()
    assert jax.config.jax_compilation_cache_dir == before[0]
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    try:
        compilation_cache.keep()
        assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path) + "/")
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
