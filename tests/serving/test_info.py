"""`loong info`: its table, its JSON, its refusals; no JAX."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from loong_jax.default_model import DEFAULT_MODEL
from serving import cli


def info(*args):
    return CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, ["info", *args])


def test_the_table_and_what_to_type():
    done = info("llama-3.1-8b", "--topology", "v5e:2x4")
    assert done.exit_code == 0, done.output
    assert "8 x v5e" in done.stdout
    assert "the weights do not fit" in done.stdout
    assert "* loong serve llama-3.1-8b --instances 1 --tp 8 --pool-tokens " in done.stdout


def test_json_of_a_folder():
    done = info(str(DEFAULT_MODEL), "--topology", "H200:4", "--json", "--tp", "2", "--dtype", "bfloat16")
    found = json.loads(done.stdout)
    assert (found["hardware"], found["devices"], found["dtype"], found["suggested_tp"]) == ("H200", 4, "bfloat16", 2)
    (fit,) = found["fits"]
    assert fit["instances"] == 2
    assert fit["pool_tokens"] == 2 * fit["instance_tokens"] > 10**8


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["nowhere", "--topology", "v5e:1"], 1, "model: 'nowhere'"),
        (["lwm-7b", "--topology", "v5e"], 1, "topology: 'v5e'"),
        (["lwm-7b", "--topology", "v5e:8", "--tp", "3"], 1, "tp: 3 does not divide 8"),
        (["lwm-7b", "--topology", "v5e:8", "--memory-share", "0"], 1, "memory-share: "),
        (["lwm-7b", "--topology", "v5e:8", "--memory-share", "nan"], 1, "memory-share: "),
        (["lwm-7b", "--topology", "v5e:8", "--dtype", "int4"], 1, "dtype: 'int4'"),
        (["llama-3.1-70b", "--topology", "v5e:2"], 1, "the weights do not fit into v5e:2"),
        (["lwm-7b"], 2, "--topology"),
    ],
)
def test_refusals(args, code, words):
    done = info(*args)
    assert done.exit_code == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_no_jax_is_loaded():
    code = (
        "import sys; from serving import info; info.info('lwm-7b', 'v5e:8'); "
        "sys.exit(any(name in sys.modules for name in ('jax', 'flax')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300, check=False, capture_output=True).returncode == 0
