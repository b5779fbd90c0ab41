"""Models by name and by config.json."""

from pathlib import Path

import pytest

from loong_jax.aot.models import SHAPES, model_named
from loong_jax.cost.roofline import shape_of
from loong_jax.model.untrusted import CheckpointError

FIXTURE = Path(__file__).resolve().parents[2] / "fixtures" / "models" / "gqa"


@pytest.mark.parametrize(
    ("name", "params"), [("llama-2-7b", 6.74e9), ("llama-3-8b", 8.03e9), ("qwen3-32b", 32.8e9), ("llama-3-70b", 70.6e9)]
)
def test_shapes_have_the_published_size(name: str, params: float):
    model = model_named(name)
    shape = shape_of(model)
    assert shape.linear_params + 2 * shape.head_params == pytest.approx(params, rel=0.005)
    assert model.dtype == "bfloat16"


def test_checkpoints():
    assert model_named(str(FIXTURE)) == model_named(str(FIXTURE / "config.json"))
    assert model_named(str(FIXTURE)).num_layers >= 1


def test_refusals(tmp_path: Path):
    with pytest.raises(ValueError, match=f"model: 'gpt-5' is neither .* one of {', '.join(SHAPES)}"):
        model_named("gpt-5")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="architectures"):
        model_named(str(tmp_path))
