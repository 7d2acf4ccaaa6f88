"""The registry by itself, with kernels made up here: who serves, who is asked next, and what is counted."""

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlm_mpi
from mlm_mpi.backend import choice, registry
from mlm_mpi.backend.cpu import provider as cpu
from mlm_mpi.backend.cuda import provider as cuda
from mlm_mpi.backend.registry import Kernel, Provider, Table, served, use
from mlm_mpi.errors import ConfigError


@served
def answer(x: int) -> str:
    """As a function of ops/gelu.py would be."""
    return f"reference {x}"


answer.__wrapped__.__module__ = "mlm_mpi.ops.gelu"  # type: ignore[attr-defined]
gelu_answer = served(answer.__wrapped__)  # type: ignore[attr-defined]


def table(*limits: int, lacks: str = "") -> Table:
    """A kernel for numbers up to each limit, the variant named after it."""

    def kernel(limit: int) -> Kernel:
        return Kernel(
            contract=lambda x: "" if x <= limit else "too large",
            launch=lambda library, x: f"{library} {limit} {x}",
            variant=f"to{limit}",
            lacks=lambda library: lacks,
        )

    return Table({"gelu.answer": [kernel(limit) for limit in limits]})


@pytest.fixture(autouse=True)
def _afterwards() -> Iterator[None]:
    yield
    choice.select()


def test_the_first_kernel_that_fits_serves_and_refusals_of_the_device_are_counted() -> None:
    first = Provider("X", "NumPy", table(3, 5), "first", level="new")
    use(first, Provider("Y", "NumPy", table(7, 9), "second"))
    assert [gelu_answer(x) for x in (3, 5, 7, 9, 11)] == [
        "first 3 3", "first 5 5", "second 7 7", "second 9 9", "reference 11",
    ]  # fmt: skip
    assert registry.refusals() == {"gelu.answer/to3: too large": 4, "gelu.answer/to5: too large": 3}
    assert registry.fallbacks() == {"gelu.answer: too large": 1}
    assert registry.serving()["gelu"] == "X kernel (to3, to5, new)"
    assert registry.serving("float64")["gelu"] == "reference (NumPy): float64"
    assert registry.serving()["linear"] == "reference (NumPy): no kernel"
    assert registry.summary() == "X kernel (to3, to5, new)"


def test_what_a_machine_lacks_is_never_asked() -> None:
    use(Provider("X", "NumPy", table(3, lacks="another GPU"), "first"))
    assert gelu_answer(1) == "reference 1" and not registry.refusals() and not registry.fallbacks()
    use(Provider("X", "NumPy", table(3), lacks="no library"))
    assert gelu_answer(1) == "reference 1" and not registry.refusals()
    assert registry.serving()["gelu"] == "reference (NumPy): no library"


@pytest.mark.parametrize("reference", [["gelu"], ["all"], ["linear", "gelu"]])
def test_the_reference_serves_where_it_is_asked_for(reference: list[str]) -> None:
    use(Provider("X", "NumPy", table(3), "first"), reference=reference)
    assert gelu_answer(1) == "reference 1" and not registry.fallbacks()
    assert registry.serving()["gelu"] == "reference (NumPy): numerics.reference asks for it"


def test_an_unknown_op_is_one_line_that_names_the_choices() -> None:
    stands = registry.in_force()
    with pytest.raises(ConfigError, match=r"^numerics.reference names 'gelo': choose among matmul, .*, sgd, all$"):
        choice.select(reference="gelu, gelo")
    assert registry.in_force() is stands


def test_every_op_that_asks_for_kernels_is_known_by_name() -> None:
    asking = set()
    for room in ("ops", "optim", "backend"):
        package = importlib.import_module(f"mlm_mpi.{room}")
        for name in (module.name for module in pkgutil.iter_modules(package.__path__) if module.name[0] != "_"):
            functions = vars(importlib.import_module(f"mlm_mpi.{room}.{name}")).values()
            if any(getattr(function, "__code__", None) is answer.__code__ for function in functions):
                asking.add(name)
    assert asking | {"sgd"} == set(registry.OPS), "sgd has no kernel and asks for none"
    assert {function.partition(".")[0] for function in (*cpu.KERNELS, *cuda.KERNELS)} <= asking


FRESH = """
from mlm_mpi.backend import registry, sums
import numpy as np
out = np.zeros(3, "f4")
sums.tree([out + 1, out + 2], (0, 1), out)
assert (out == 3).all() and not registry.fallbacks()
print(registry.summary())
"""


def test_until_somebody_chooses_the_references_run() -> None:
    root = Path(mlm_mpi.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", FRESH], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "reference (NumPy): nobody has chosen kernels\n"
