"""A smaller scripts/bench_cancel.py: cancels in every state through server, manager and policy; nothing may be left."""

import asyncio

from shell_load.cancels import STATES, Cancels


def test_cancels_in_every_state_free_everything():
    async def run():
        async with Cancels(step_s=0.002) as cancels:
            await cancels.run(num_each=12, num_clients=16)
            # A cancel may come late and meet another state: all are met, and `run` has looked for what is left.
            assert all(len(cancels.latencies_s[state]) >= 12 for state in STATES)

    asyncio.run(run())
