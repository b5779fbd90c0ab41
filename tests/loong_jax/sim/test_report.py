import json

import msgspec

from loong_jax.sim import Slo, run
from loong_jax.sim.report import report, sweep
from tests.support.simulated import small_config


def made(rate: float = 1.0) -> dict:
    config = small_config([(0, 10, 3), (1000, 20, 60), (10_000, 7, 2)], slo=Slo(lambda n: 0.001), drain_s=0.02)
    workload = msgspec.structs.replace(config.workload, rate=rate)
    return report(run(config), policy="p", workload=workload, seed=5, bounds=(300.0, 250.0))


def test_a_report_has_what_is_promised() -> None:
    data = json.loads(msgspec.json.encode(made()))
    assert data["slo_attainment"] == 2 / 3
    assert len(data["attainment_by_decile"]) == 10
    assert data["goodput"] == 2 / 0.01
    assert data["bound_share"] == 200 / 300
    assert data["bound_full_group"] == 250
    assert data["unfinished"] == 1
    columns = data["requests"]
    assert {len(column) for column in columns.values()} == {3}
    assert columns["prompt_len"] == [10, 20, 7]
    assert columns["tpot_s"][1] == -1


def test_a_sweep_has_the_goodput_of_each_policy() -> None:
    runs = [
        {"workload": "w", "policy": policy, "offered_rate": rate, "slo_attainment": attained}
        for policy, rate, attained in (("a", 2.0, 0.8), ("a", 1.0, 1.0), ("b", 1.0, 0.5), ("b", 2.0, 0.4))
    ]
    assert sweep(runs)["p90_goodput"] == {"w": {"a": 1.5, "b": 0.0}}
