"""Compiles of the process are counted, unless they are declared ours."""

import jax
import jax.numpy as jnp
import pytest

from loong_jax.compile_watch import CompileWatch


@pytest.fixture
def watch():
    watch = CompileWatch()
    watch.start()
    yield watch
    watch.close()


def compile_something(size: int) -> None:
    jax.jit(lambda x: x * 2 + size).lower(jax.ShapeDtypeStruct((size,), jnp.float32)).compile()


def test_strays_are_counted(watch: CompileWatch):
    compile_something(771)
    assert watch.num_stray >= 1


def test_ours_are_not(watch: CompileWatch):
    with watch.ours():
        compile_something(773)
    assert watch.num_stray == 0


def test_nothing_is_counted_after_close(watch: CompileWatch):
    watch.close()
    compile_something(779)
    assert watch.num_stray == 0
