"""On the way to the weights nobody asks a library for more than IEEE operations, which have one result.

What is looked for by name, in every module of the step (initial weights, order of the data, forward, backward,
reduction, norm, schedule, update): functions that libraries round as they like, sums in an order of theirs, BLAS. Where
one stands it belongs to the reference of an op, which the fingerprint names where it computes, or the reason is listed.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mlm_mpi"
PATH = (
    "rng.py", "exact.py", "cut.py", "order.py", "params", "layers", "ops", "models", "optim", "rates", "schedules",
    "comm/tree.py", "comm/buckets.py", "comm/reductions", "backend/arrays.py", "backend/registry.py", "backend/sums.py",
    "backend/cpu", "data/batch.py", "data/sampler.py", "data/loader.py", "data/stream.py", "data/objectives",
    "data/corruption.py", "data/documents.py", "data/masking.py", "data/mixture.py", "data/pairs.py", "data/texts.py",
    "data/preferences.py", "data/translation.py", "data/warmup.py",
    "train/assignment.py", "train/audit.py", "train/build.py", "train/captured.py", "train/engine.py", "train/guard.py",
    "train/replicas.py",
)  # fmt: skip
FUNCTIONS = {
    "sin", "cos", "tan", "tanh", "sinh", "cosh", "arctan", "arctan2", "exp", "exp2", "expm1", "log", "log2", "log10",
    "log1p", "logaddexp", "power", "pow", "float_power", "cbrt", "hypot", "erf", "gamma", "lgamma", "sinc",
}  # fmt: skip
SUMS = {
    "sum", "nansum", "mean", "average", "var", "std", "cumsum", "prod", "cumprod", "dot", "vdot", "inner", "matmul",
    "einsum", "tensordot", "norm", "trace", "reduceat", "reduce", "convolve", "correlate", "sumprod",
}  # fmt: skip

ALLOWED = {
    ("comm/reductions/canonical.py", "Canonical._combine", "sum"): "whole numbers",
    ("comm/reductions/canonical.py", "Canonical._owned_elements", "sum"): "whole numbers",
    ("params/clip.py", "share_norms", "sum"): "whole numbers",
    ("data/objectives/causal.py", "Windows.batch", "mask.sum"): "whole numbers",
    ("data/corruption.py", "corrupted", "np.cumsum"): "whole numbers",
    ("data/masking.py", "Masked.batch", "there[row].sum"): "whole numbers",
    ("data/texts.py", "Noise.apart", "np.cumsum"): "whole numbers",
    ("data/texts.py", "Noise.apart", "chosen[:second].sum"): "whole numbers",
    ("data/texts.py", "batch_of", "np.cumsum"): "whole numbers",
    ("data/texts.py", "too_long", "needed > context.sum"): "whole numbers",
    ("data/translation.py", "_row", "np.cumsum"): "whole numbers",
    ("data/translation.py", "too_long", "needed > context.sum"): "whole numbers",
    ("data/mixture.py", "Joined.__init__", "np.cumsum"): "whole numbers",
    ("data/pairs.py", "Noise.__init__", "np.cumsum"): "whole numbers",
    ("data/pairs.py", "Pairs._left_over", "np.cumsum"): "whole numbers",
    ("data/pairs.py", "kept", "counts.sum"): "whole numbers",
    ("data/mixture.py", "Joined.__len__", "sum"): "whole numbers",
    ("data/mixture.py", "Mixture.whole", "sum"): "whole numbers",
    ("data/mixture.py", "_stacked", "sum"): "whole numbers",
    ("data/sampler.py", "Sampler.__init__", "sum"): "whole numbers",
    ("data/warmup.py", "Ramp.before", "sum"): "whole numbers",
    ("layers/base.py", "elements", "sum"): "whole numbers",
    ("models/bert.py", "flops", "**"): "whole numbers, for people",
    ("models/gpt.py", "flops", "**"): "whole numbers, for people",
    ("models/llama.py", "flops", "sum"): "whole numbers, for people",
    ("layers/head.py", "TokenHead.logits_backward", "**"): "explains a text: no weight depends on it",
    ("ops/attention.py", "probabilities", "@"): "explains a text: no weight depends on it",
    ("ops/attention.py", "probabilities", "xp.exp"): "explains a text: no weight depends on it",
    ("ops/attention.py", "probabilities", "p.sum"): "explains a text: no weight depends on it",
    ("ops/crossentropy.py", "summed", "parts.sum"): "on a GPU; of preferences a weight depends on it, of nothing else",
    ("ops/crossentropy.py", "summed", "part.sum"): "of what is not finite, where fsum raises",
    ("ops/dropout.py", "Draw.cut", "sum"): "whole numbers",
    ("ops/matmul.py", "summed", "@"): "in the references of matmul and linear only",
    ("params/digest.py", "digest", "words[:whole].reshape(…).sum"): "whole numbers",
    ("train/audit.py", "Audit.testimony", "sum"): "whole numbers",
    ("params/store.py", "FlatStore.__init__", "np.prod"): "whole numbers",
    ("params/store.py", "FlatStore.count", "sum"): "whole numbers",
    ("params/store.py", "FlatStore.frozen_count", "sum"): "whole numbers",
}


def asked(node: ast.AST) -> str | None:
    """What a library is asked for here."""
    if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult | ast.Pow):
        operands = (node.left, node.right) if isinstance(node, ast.BinOp) else ()
        literal = operands and not any(isinstance(part, ast.Name) for operand in operands for part in ast.walk(operand))
        return None if literal else {ast.MatMult: "@", ast.Pow: "**"}[type(node.op)]  # 2.0**-32 is folded
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Name):
        return node.func.id if node.func.id in ("sum", "pow") else None
    if not isinstance(node.func, ast.Attribute) or node.func.attr not in FUNCTIONS | SUMS:
        return None
    of = ast.unparse(node.func.value)
    if of in ("self", "exact") or (of, node.func.attr) == ("math", "prod"):  # ours; whole numbers
        return None
    name = ast.unparse(node.func.value.func) + "(…)" if isinstance(node.func.value, ast.Call) else of
    return f"{name}.{node.func.attr}"


def functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.AST]]:
    """(qualified name, node) of every function, those inside others as part of them; ("", module) for the rest."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{inside}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield f"{inside}{node.name}", node
        else:
            yield inside, node


def references(tree: ast.Module) -> set[str]:
    """Functions that a kernel replaces (`@served`), and those that only these use."""
    nodes = list(functions(tree))
    users = {name: {other for other, node in nodes if other != name and name in names(node)} for name, _ in nodes}
    found = {
        name for name, node in nodes
        if isinstance(node, ast.FunctionDef) and any("served" in ast.unparse(d) for d in node.decorator_list)
    }  # fmt: skip
    while more := {name for name in users if name.startswith("_") and users[name] and users[name] <= found} - found:
        found |= more
    return found


def names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def asked_in(source: str) -> set[tuple[str, str]]:
    """(function, what it asks a library for), references left out."""
    tree = ast.parse(source)
    left_out = references(tree)
    return {
        (name, what)
        for name, node in functions(tree) if name not in left_out
        for part in ast.walk(node) if (what := asked(part))
    }  # fmt: skip


def modules() -> list[Path]:
    found = [PACKAGE / name for name in PATH]
    return sorted(file for path in found for file in ([path] if path.suffix else path.rglob("*.py")) if file.exists())


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_left_to_a_library(path):
    module = str(path.relative_to(PACKAGE))
    found = {(module, *place) for place in asked_in(path.read_text(encoding="utf-8"))}
    assert found <= set(ALLOWED), "take it from exact.py, add in an order of your own, or say why it decides nothing"


def test_what_is_looked_for_is_found():
    source = """
import math, numpy as np
SCALE = np.exp(1.0) ** 2 + 2.0**-32
def _of_reference(x): return np.tanh(x)
def _of_both(x): return x @ x
@served
def forward(x): return _of_reference(x) + _of_both(x) + x.sum()
class Layer:
    def step(self, beta, n):
        def inner(x): return x.mean() + math.prod((2, 3)) + self.norm(x)
        total = sum([beta**n, math.log(n)]) + exact.log(n)
        return _of_both(total)
"""
    assert asked_in(source) == {
        ("", "np.exp"), ("", "**"), ("_of_both", "@"), ("Layer.step", "x.mean"), ("Layer.step", "**"),
        ("Layer.step", "sum"), ("Layer.step", "math.log"),
    }  # fmt: skip
