"""What is said of two runs that differ: settings by their keys, and the cause before what it brings with it."""

from typing import Any

from mlm_mpi import config
from mlm_mpi.train.fingerprint import differences
from mlm_mpi.train.same_run import config_differences

ONE: dict[str, Any] = {"blas": ["openblas 0.3"], "reduction": "canonical", "threads": 1}


def test_a_changed_reduction_is_named_and_not_the_ranks_that_come_with_it() -> None:
    other = ONE | {"reduction": "allreduce", "ranks": 2}
    assert differences(ONE, other) == ["comm.reduction: canonical → allreduce", "ranks: none → 2"]
    assert differences(other, ONE) == ["comm.reduction: allreduce → canonical", "ranks: 2 → none"]


def test_a_setting_is_named_by_its_key_and_the_machine_by_its_part() -> None:
    assert differences(ONE, ONE | {"threads": 2}) == ["numerics.threads: 1 → 2"]
    assert differences(ONE, ONE | {"blas": ["mkl"]}) == ["blas: ['openblas 0.3'] → ['mkl']"]
    assert differences(ONE, dict(ONE)) == []


def test_every_setting_of_the_fingerprint_has_the_name_of_a_key() -> None:
    facts = ("threads", "products", "shares", "dtype", "micro_batches", "rows", "lanes", "reduction")
    changed = dict.fromkeys(facts, "x")
    keys = {line.partition(":")[0] for line in differences(changed, dict.fromkeys(changed, "y"))}
    table = config.to_table(config.load(None))
    assert keys <= {f"{section}.{key}" for section, values in table.items() for key in values}
    assert len(keys) == len(changed)


def test_settings_that_differ_are_named_by_their_keys() -> None:
    saved = config.to_table(config.load(None))
    now = config.load(None, ["model.width=64", "optim.name=sgd"])
    found = config_differences(saved, now)
    assert f"model.width: {saved['model']['width']} → 64" in found
    assert "optim.name: adamw → sgd" in found
