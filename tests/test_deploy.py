"""What is in deploy/ fits the program: files that parse, flags that exist, ports and paths that agree."""

import re
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from serving import cli
from serving.spellings import respelled

DEPLOY = Path(__file__).parents[1] / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
MANIFESTS = sorted(DEPLOY.glob("gke-*.yaml"))
SERVE = typer.main.get_command(cli.app).commands["serve"]
FLAGS = {spelling for parameter in SERVE.params for spelling in parameter.opts}


def check_flags(args):
    names = {arg.split("=")[0] for arg in respelled(args) if arg.startswith("--")}
    assert names <= FLAGS, names - FLAGS


def value(args, flag):
    return next(arg.split("=", 1)[1] for arg in args if arg.startswith(f"{flag}="))


def test_everything_is_there():
    assert [path.suffix for path in DOCKERFILES] == [".cpu", ".cuda", ".tpu"]
    assert [path.stem for path in MANIFESTS] == ["gke-gpu", "gke-tpu"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles(path):
    text = path.read_text()
    sources = [word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M) for word in line.split()[:-1]]
    assert sources
    kept = (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    for source in sources:
        assert (DEPLOY.parent / source).exists(), source
        assert f"!{source}" in kept, f"{source} is not sent to the build"
    extras = re.search(r'pip install --no-cache-dir "\.\[(.*)\]"', text).group(1).split(",")
    known = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) <= set(known)
    args = re.findall(r'"([^"]*)"', re.search(r"^CMD (.*)$", text, re.M).group(1))
    check_flags(args)
    assert re.search(r"^EXPOSE 50051 8000$", text, re.M)
    assert args[args.index("--http-port") + 1] == "8000"
    assert re.search(r"^USER 10001$", text, re.M)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests(path):
    deployment, service = yaml.safe_load_all(path.read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    args = container["args"]
    check_flags(args)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": int(value(args, "--port")), "http": int(value(args, "--http-port"))}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == set(ports)
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["grpc"]["port"] == ports["grpc"]
    assert container["livenessProbe"]["tcpSocket"]["port"] == ports["grpc"]
    wait_s = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod["terminationGracePeriodSeconds"] > wait_s + float(value(args, "--drain-s"))
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert value(args, "--cache-dir") == mounts["cache"]
    assert value(args, "--api-keys").startswith(mounts["keys"])
    assert args[0].startswith(mounts["models"])
    (devices,) = (int(n) for name, n in container["resources"]["limits"].items() if "." in name)
    assert int(value(args, "--instances")) * int(value(args, "--tp")) == devices
    assert container["image"].split(":")[1] in {dockerfile.suffix[1:] for dockerfile in DOCKERFILES}
    assert value(args, "--host") == "0.0.0.0"


def test_the_unit_and_its_configuration():
    unit = (DEPLOY / "loong.service").read_text()
    settings = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and line[0].isalpha())
    words = settings["ExecStart"].split()
    check_flags(words[2:])
    assert words[1] == "serve"
    config = tomllib.loads((DEPLOY / "loong.toml").read_text())
    assert {f"--{name}" for name in config} - {"--model"} <= FLAGS
    assert float(settings["TimeoutStopSec"]) > config["drain-s"]
    assert config["cache-dir"] == f"/var/cache/{settings['CacheDirectory']}"
