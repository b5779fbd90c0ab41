"""The configuration is there without the packages of the extra."""

import subprocess
import sys

from serving.http.config import HttpConfig


def test_loopback_unless_told_otherwise():
    assert HttpConfig().host == "127.0.0.1"


def test_no_package_of_the_extra_is_loaded_without_a_listener():
    program = "import sys, serving.launch; print(sorted({'uvicorn', 'starlette', 'pydantic'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
