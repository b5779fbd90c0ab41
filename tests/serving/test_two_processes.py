"""One engine over two processes of two virtual devices each: jax.distributed, gloo, the leader and its worker.

The control stream alone, with executors that only record, is tests/serving/test_cluster.py.
"""

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np

from loong_jax import codec
from loong_jax.cost.fitted import FittedCost
from loong_jax.eventlog import read_event_log
from loong_jax.manager import Manager
from loong_jax.policy import POLICIES
from loong_jax.types import Adjustment, AnyCommand, RunDecode, RunPrefill
from serving.client import Generation, LoongClient, generate_request
from tests.support import sampling_reference as reference
from tests.support.fixtures import load_fixture, model_directory, random_prompt
from tests.support.process import ROOT, Process, free_port

FIXTURE = "gqa"
FIRST, SECOND = {0, 1}, {2, 3}
INSTANCE_TOKENS = 512
LONG_TOKENS = 1300  # three instances


class Engine(NamedTuple):
    address: str
    leader: Process
    worker: Process
    log: Path


@contextlib.contextmanager
def engine(out: Path, instances: int, *flags: str) -> Iterator[Engine]:
    """Every process compiles all of its programs at each start, so there are as few as a test can do with."""
    port, control, coordinator = free_port(), free_port(), free_port()
    model, cache = str(model_directory(FIXTURE)), ("--cache-dir", str(ROOT / ".cache" / "test-serve"))
    addresses = ("--coordinator", f"127.0.0.1:{coordinator}", "--control", f"127.0.0.1:{control}")
    sizes = ("--prefill-buckets", "128", "--decode-buckets", "8", "--pool-tokens", str(INSTANCE_TOKENS * instances))
    groups = ("--instances", str(instances), "--dops", f"1,{instances}", "--num-processes", "2", "--platform", "cpu")
    log = out / "events.log"
    with (
        Process(
            out / "leader.log",
            *("serve", model, "--port", str(port), *groups, *sizes, "--max-running", "16", *flags),
            *(*addresses, *cache, "--event-log", str(log)),
        ) as leader,
        Process(
            out / "worker.log",
            *("worker", model, "--leader", f"127.0.0.1:{control}", "--process-id", "1", "--platform", "cpu", *cache),
        ) as worker,
    ):
        leader.wait_for("ready: ")
        yield Engine(f"127.0.0.1:{port}", leader, worker, log)


def answers(address: str, *requests) -> list[Generation]:
    async def run():
        async with LoongClient(address) as client:
            return await asyncio.gather(*(client.generate(request, 240) for request in requests))

    return asyncio.run(run())


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    return random_prompt(load_fixture(FIXTURE).config, num_tokens, seed).tolist()


def check_with_oracle(prompt: list[int], answer: Generation) -> None:
    """Each token is the likeliest one (or within 1e-3 of it) and has the oracle's logprob."""
    rows = load_fixture(FIXTURE).oracle.logprobs(np.array(prompt + answer.token_ids))[len(prompt) - 1 : -1]
    theirs = rows[np.arange(len(rows)), answer.token_ids]
    np.testing.assert_allclose(answer.logprobs, theirs, atol=1e-4)
    assert (rows.max(-1) - theirs < 1e-3).all()


def check_sampling(address: str, prompt: list[int]) -> None:
    """Every process counts what penalties need, and answers to one prompt are as if each were asked for alone."""
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3, "logit_bias": {5: 2.0}}
    greedy = generate_request(prompt, max_tokens=8, ignore_eos=True, **penalties)
    warm = {"max_tokens": 4, "temperature": 1.0, "ignore_eos": True, "seed": 3}

    async def choices() -> list[Generation]:
        async with LoongClient(address) as client:
            return await client.generate_choices(generate_request(prompt, n=2, **warm), 240)

    together = asyncio.run(choices())
    answer, *alone = answers(address, greedy, *(generate_request(prompt, **warm | {"seed": 3 + i}) for i in range(2)))
    assert [choice.token_ids for choice in together] == [other.token_ids for other in alone]
    rows = load_fixture(FIXTURE).oracle.logits(np.array(prompt + answer.token_ids))[len(prompt) - 1 : -1]
    adjustment = Adjustment(((5, 2.0),), 0, 1.3, 0.5, 0.5)
    for index, (row, token) in enumerate(zip(rows, answer.token_ids, strict=True)):
        scores = reference.adjusted(row, adjustment, prompt, answer.token_ids[:index])
        assert scores[token] > scores.max() - 1e-3


def commands_of(log: Path) -> list[AnyCommand]:
    """The leader's commands, by replay of its log."""
    header, frames = read_event_log(log)
    policy = POLICIES[header.policy](header.cluster, header.limits)
    manager = Manager(header.cluster, header.limits, policy, FittedCost(header.coefficients, header.cluster.ladder))
    out: list[AnyCommand] = []
    for frame in frames:
        commands = manager.handle(frame.event, frame.now_us)
        assert codec.digest(commands) == frame.commands_digest
        out += commands
    return out


def spans_both(instances: tuple[int, ...]) -> bool:
    return bool(FIRST & set(instances)) and bool(SECOND & set(instances))


def test_groups_over_both_processes_give_the_oracles_tokens(tmp_path):
    prompts = [prompt_of(LONG_TOKENS, 0), prompt_of(60, 1), prompt_of(9, 2), prompt_of(400, 3)]
    requests = [generate_request(p, max_tokens=12, ignore_eos=True) for p in prompts]
    with engine(tmp_path, 4, "--warm-up", "full") as found:
        together = answers(found.address, *requests)
        check_sampling(found.address, prompts[3])
        alone = [answers(found.address, request)[0] for request in (requests[0], requests[3])]
        for prompt, answer in zip([*prompts, prompts[0], prompts[3]], [*together, *alone], strict=True):
            assert len(answer.token_ids) == 12
            check_with_oracle(prompt, answer)
        assert [together[0].token_ids, together[3].token_ids] == [answer.token_ids for answer in alone]

        steps = [c for c in commands_of(found.log) if isinstance(c, RunPrefill | RunDecode)]
        kinds = [(type(c), spans_both(c.instances)) for c in steps]
        assert {(RunPrefill, True), (RunDecode, True)} <= set(kinds)
        assert (len(steps[-12].instances), kinds[-12]) == (4, (RunPrefill, True))
        assert {(type(c), len(c.instances)) for c in steps[-11:]} == {(RunDecode, 1)}, "regrouped after the prefill"
        assert found.leader.end() == 0, found.leader.words()
        assert found.worker.popen.wait(60) == 0, found.worker.words()


def test_nobody_waits_for_ever_when_the_worker_is_lost(tmp_path):
    """Every stream ends, with all its tokens or with a status, and so does the leader: a supervisor restarts both."""
    prompts = [prompt_of(450, 4), *(prompt_of(30 + i, 5 + i) for i in range(8))]

    async def run(found: Engine) -> list[Generation | BaseException]:
        async with LoongClient(found.address) as client:
            requests = [generate_request(p, max_tokens=400, ignore_eos=True) for p in prompts]
            tasks = [asyncio.create_task(client.generate(request, 300)) for request in requests]
            while not all(i.pages_used for i in (await client.state()).instances):
                await asyncio.sleep(0.01)
            found.worker.end(signal.SIGKILL)
            return await asyncio.gather(*tasks, return_exceptions=True)

    with engine(tmp_path, 2) as found:
        for prompt, answer in zip(prompts, asyncio.run(run(found)), strict=True):
            if isinstance(answer, Generation):
                check_with_oracle(prompt, answer)
            else:
                assert isinstance(answer, grpc.aio.AioRpcError)
                assert answer.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL), answer
        assert found.leader.popen.wait(120) != 0
