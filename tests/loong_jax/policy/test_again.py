"""The last decision is taken again only where planning would come to the same."""

from __future__ import annotations

import random

import pytest

from loong_jax.cost.presets import cost_for
from loong_jax.policy.again import NOTHING, Again
from loong_jax.policy.elastic import Elastic
from loong_jax.policy.scale import DecodePlanner
from loong_jax.sim import SimConfig, make_workload, run, sim_cluster
from loong_jax.types import Plan, View
from tests.support.views import Seen, decoding, draft, instance


def kept(*rows: Seen) -> tuple[Again, Plan]:
    made = draft(rows)
    planner = DecodePlanner(made, rows)
    steps = planner.plan()
    again = Again()
    again.keep(7, planner.groups, steps)
    return again, Plan(decodes=tuple(steps))


ROWS = (decoding(0, {0: 2}, open_page=(0, 1)), decoding(1, {1: 2}), decoding(2, {1: 1}))


def test_the_same_steps_while_the_version_is_the_same() -> None:
    again, plan = kept(*ROWS)
    idle = draft(()).view.instances
    assert again.plan(7, idle) == plan
    assert again.plan(8, idle) is None


def test_only_groups_with_room_go_on() -> None:
    again, plan = kept(*ROWS)
    busy = (instance(0, queued=2), *(instance(i) for i in (1, 2, 3)))
    assert again.plan(7, busy) == Plan(decodes=plan.decodes[1:])
    assert again.plan(7, [instance(i, queued=2) for i in range(4)]) is NOTHING


def test_a_master_short_of_pages_is_planned_anew() -> None:
    again, _ = kept(*ROWS)
    assert again.plan(7, [instance(i, free=1) for i in range(4)]) is None  # two rows may need one each
    assert again.plan(7, [instance(i, free=2) for i in range(4)]) is not None


def test_rows_that_were_left_out_are_looked_at_again() -> None:
    again, _ = kept(*(decoding(i, {0: 1}) for i in range(4)))  # a bucket of two
    assert again.plan(7, draft(()).view.instances) is None


def test_a_group_of_one_is_kept_though_it_had_no_room() -> None:
    """It has no choice: one master, and all rows."""
    made = draft(ROWS, (instance(0, queued=2), *(instance(i) for i in (1, 2, 3))))
    planner = DecodePlanner(made, ROWS)
    again = Again()
    again.keep(7, planner.groups, planner.plan())
    assert again.plan(7, draft(()).view.instances) == kept(*ROWS)[1]
    waits = [decoding(0, {0: 1}, device_group=(1,), in_flight=1)]  # for the host
    again.keep(8, DecodePlanner(draft(waits), waits).groups, [])
    assert again.plan(8, draft(()).view.instances) is None


def who_runs_where(plan: Plan) -> dict[tuple[int, ...], set[int]]:
    """A row at the end of a page may get another master when it is planned anew; either is right."""
    return {step.instances: {row.request for row in step.rows} for step in plan.decodes}


class Compared(Elastic):
    """Plans anew whenever the last decision would be taken again, and compares."""

    num_again = 0

    def plan(self, view: View, cost) -> Plan:
        again = self._again.plan(view.version, view.instances)
        if again is None:
            return super().plan(view, cost)
        self.num_again += 1
        fresh = Elastic(self.cluster, self.limits).plan(view, cost)
        assert who_runs_where(again) == who_runs_where(fresh), view.now_us
        assert (fresh.prefills, fresh.evicts, fresh.migrates) == ((), (), ())
        return again


@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_planning_comes_to(seed: int) -> None:
    cost = cost_for("A800", "lwm-7b", 2, 4)
    made: list[Compared] = []

    def policy(cluster, limits) -> Compared:
        made.append(Compared(cluster, limits))
        return made[0]

    pool = random.Random(seed).choice((3000, 20_000))
    workload = make_workload("sharegpt", rate=3.0, num_requests=25, seed=seed)
    result = run(SimConfig(times=cost, workload=workload, cluster=sim_cluster(4, pool_tokens=pool), policy=policy))
    assert result.summary.unfinished == 0
    assert made[0].num_again > 500
