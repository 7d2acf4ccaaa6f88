"""Launches of the matrix products: the four functions are one product with an epilogue; three kernels can run it.

    hopper   bfloat16, wgmma fed by TMA: addresses and pitches in multiples of 16 bytes
    mma      bfloat16, mma.sync fed by cp.async: also rows in multiples of 16 bytes
    plain    float32 or bfloat16, any size, address and pitch

A kernel sums tiles of the result. Which tile, and whether a tile is summed in pieces by several blocks (kernels/cuda/
matmul.cuh), is `plan`: a function of the shape and the number of multiprocessors alone, and so are the bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlm_mpi.backend.cuda.contracts import ELEMENTS, dense, element, on_device, shaped
from mlm_mpi.backend.kernels import kernel

MAX_PITCH = 1 << 24  # elements: offsets within a tile are 32-bit
PIECE_THREADS, PIECE_RUN = 256, 4  # matmul_pieces.cu


# ---- what is asked for


@dataclass(frozen=True)
class Product:
    """out = epilogue(a b). Shapes: a (M, K), b (K, N); `other` (M, N): the residual, or the input of the GELU.

    `out`: an (M, N) array, or None: a new one of the operands' dtype.
    """

    epilogue: str  # of kernels/cuda/matmul.cuh
    a: Any
    b: Any
    out: Any = None
    bias: Any = None
    other: Any = None
    accumulate: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        return self.a.shape[0], self.b.shape[1], self.a.shape[1]

    @property
    def arrays(self) -> list[Any]:
        return [x for x in (self.a, self.b, self.out, self.bias, self.other) if x is not None]


def _add(a: Any, b: Any, out: Any, accumulate: bool) -> Product:
    return Product("STORE", a, b, out=out, accumulate=accumulate)


def _forward(x: Any, w: Any, b: Any, residual: Any = None) -> Product:
    return Product("BIAS" if residual is None else "RESIDUAL", x, w, bias=b, other=residual)


def _forward_gelu(x: Any, w: Any, b: Any) -> Product:
    return Product("GELU", x, w, bias=b)


def _backward_input(dy: Any, w: Any, pre: Any = None) -> Product:
    return Product("STORE" if pre is None else "SLOPE", dy, w.T, other=pre)


# ---- contracts


def layout(x: Any) -> tuple[int, bool] | None:
    """(pitch in elements, whether rows rather than columns are contiguous) of a matrix; None: neither is."""
    (rows, columns), (down, along) = x.shape, x.strides
    for stride, unit, length, by_rows in ((down, along, columns, True), (along, down, rows, False)):
        if unit == x.itemsize and stride % unit == 0 and stride >= unit * length:
            return stride // unit, by_rows
    return None


def _fits(product: Product) -> str:
    """What all three kernels ask for."""
    a, b, out = product.a, product.b, product.out
    matrices = [x for x in (a, b, out) if x is not None]
    if not all(on_device(x) and x.ndim == 2 for x in matrices):
        return "not matrices in the GPU's memory"
    if a.dtype != b.dtype or a.dtype.name not in ELEMENTS:
        return f"{a.dtype} and {b.dtype}"
    if out is not None and out.dtype not in (a.dtype, np.float32):
        return f"{out.dtype} result"
    if 0 in (*a.shape, *b.shape):
        return "empty"
    if a.shape[1] != b.shape[0]:
        return "shapes differ"
    layouts = [layout(x) for x in matrices]
    if None in layouts or (out is not None and not layouts[2][1]):  # type: ignore[index]
        return "neither rows nor columns contiguous"
    if max(pitch for pitch, _ in layouts) >= MAX_PITCH:  # type: ignore[misc]
        return "pitch too large"
    m, n, _ = product.sizes
    return (
        shaped((m, n), out, product.other)
        or shaped((n,), product.bias)
        or dense(product.bias, product.other, dtype=a.dtype)
    )


def _aligned(x: Any) -> bool:
    """Whether the array and each of its stored rows start at a multiple of 16 bytes."""
    pitches = () if x.ndim == 1 else (layout(x)[0] * x.itemsize,)  # type: ignore[index]
    return all(number % 16 == 0 for number in (x.data.ptr, *pitches))


def _all_aligned(product: Product) -> bool:
    _, n, _ = product.sizes
    new = product.out is None  # its pitch will be n
    return all(map(_aligned, product.arrays)) and (not new or n * product.a.itemsize % 16 == 0)


# ---- the plan


@dataclass(frozen=True)
class Tile:
    """m x n elements of the result, k a step; `blocks` of them run on a multiprocessor; `rate`: speed per element.

    `rate` is an assumption until `gpu-check` has measured it: a smaller tile reads more per multiplication.
    """

    m: int
    n: int
    k: int
    blocks: int
    rate: float = 1.0

    def count(self, m: int, n: int) -> int:
        return -(-m // self.m) * -(-n // self.n)


PIECES_COST = 32  # steps: partial sums are written and read once, and a second kernel starts


def plan(sizes: tuple[int, int, int], tiles: tuple[Tile, ...], processors: int) -> tuple[Tile, int]:
    """The tile to use, and the number of shares its steps are cut into: one a tile, or one a block."""
    m, n, k = sizes
    best = []
    for tile in tiles:
        count, steps, blocks = tile.count(m, n), -(-k // tile.k), tile.blocks * processors
        step_cost = tile.m * tile.n * tile.k / tile.rate
        best.append((-(-count // blocks) * steps * step_cost, tile, count))
        if count % blocks and count * steps >= blocks:
            best.append(((-(-count * steps // blocks) + PIECES_COST) * step_cost, tile, blocks))
    return min(best, key=lambda entry: entry[0])[1:]


# ---- launches


def _results(gpu: Any, product: Product) -> tuple[Any, Any]:
    """out, and the GELU's input where it is a result too."""
    (m, n, _), empty = product.sizes, gpu.cupy.empty
    out = empty((m, n), product.a.dtype) if product.out is None else product.out
    return out, empty((m, n), product.a.dtype) if product.epilogue == "GELU" else None


def _returned(product: Product, out: Any, pre: Any) -> Any:
    if product.out is not None:
        return None
    return out if pre is None else (out, pre)


def _macros(product: Product, out: Any, tile: Tile, vector: bool) -> dict[str, Any]:
    return {
        "ELEMENT": element(product.a), "RESULT": element(out), "EPILOGUE": product.epilogue, "VECTOR": int(vector),
        "TILE_M": tile.m, "TILE_N": tile.n,
    }  # fmt: skip


def _sum_pieces(
    gpu: Any, product: Product, out: Any, pre: Any, tile: Tile, shares: int, partial: Any, macros: dict[str, Any]
) -> None:
    m, n, k = product.sizes
    run = gpu.function("matmul_pieces", "matmul_pieces", **macros)
    grid = tile.count(m, n), tile.m * tile.n // (PIECE_THREADS * PIECE_RUN)
    run(
        grid,
        (PIECE_THREADS,),
        (partial, *map(np.int32, (m, n, -(-k // tile.k), shares)), out, np.int32(layout(out)[0]),  # type: ignore[index]
         np.int32(product.accumulate), product.bias, product.other, pre),
    )  # fmt: skip


def _partial(gpu: Any, product: Product, tile: Tile, shares: int) -> Any:
    """Room for the sums of pieces, a tile for each slot of `Shares`; None where every tile is one piece."""
    m, n, _ = product.sizes
    tiles = tile.count(m, n)
    return None if shares == tiles else gpu.cupy.empty((shares + tiles, tile.m, tile.n), np.float32)


def _by_blocks(gpu: Any, product: Product, stem: str, tiles: tuple[Tile, ...], threads: int, vector: bool) -> Any:
    """A product by `matmul.cu` or `matmul_bf16.cu`, which take the same arguments: a block for every share."""
    out, pre = _results(gpu, product)
    tile, shares = plan(product.sizes, tiles, gpu.processors)
    partial = _partial(gpu, product, tile, shares)
    macros = _macros(product, out, tile, vector)
    (pitch_a, a_along_k), (pitch_b, b_along_n), (pitch, _) = map(layout, (product.a, product.b, out))  # type: ignore[misc]
    along = {"A_ALONG_K": int(a_along_k), "B_ALONG_K": int(not b_along_n)}
    shared = SHARED_BYTES[stem](tile)
    run = gpu.function(stem, stem, shared_bytes=shared, **macros, **along)
    run(
        (shares,),
        (threads,),
        (product.a, product.b, *map(np.int32, (*product.sizes, pitch_a, pitch_b)), out, np.int32(pitch),
         np.int32(product.accumulate), product.bias, product.other, pre, partial, np.int32(shares)),
        shared_mem=shared,
    )  # fmt: skip
    if partial is not None:
        _sum_pieces(gpu, product, out, pre, tile, shares, partial, macros)
    return _returned(product, out, pre)


PLAIN_TILES = (Tile(128, 64, 8, blocks=3), Tile(64, 64, 8, blocks=4, rate=0.8))
MMA_TILES = (Tile(128, 128, 32, blocks=2), Tile(64, 64, 32, blocks=3, rate=0.6))


def _ring_bytes(tile: Tile) -> int:
    """Shared memory of matmul_bf16.cu: 4 stages of both operands, and later the sums."""
    return max(4 * 2 * (tile.m + tile.n) * tile.k, 4 * tile.m * (tile.n + 8))


SHARED_BYTES: dict[str, Callable[[Tile], int]] = {"matmul": lambda tile: 0, "matmul_bf16": _ring_bytes}


def _mma_fits(product: Product) -> str:
    if reason := _fits(product):
        return reason
    if product.a.dtype == np.float32:
        return "float32"
    rows = (x.shape[1] if layout(x)[1] else x.shape[0] for x in (product.a, product.b))  # type: ignore[index]
    return "" if _all_aligned(product) and not any(n % 8 for n in rows) else "rows not in multiples of 16 bytes"


def _mma(gpu: Any, product: Product) -> Any:
    return _by_blocks(gpu, product, "matmul_bf16", MMA_TILES, 128, vector=True)


def _plain(gpu: Any, product: Product) -> Any:
    vector = product.a.dtype == np.float32 and _all_aligned(product)
    return _by_blocks(gpu, product, "matmul", PLAIN_TILES, 128, vector)


# ---- the registry: every function by every kernel, the fastest first

FUNCTIONS: dict[str, Callable[..., Product]] = {
    "matmul.add": _add,
    "linear.forward": _forward,
    "linear.forward_gelu": _forward_gelu,
    "linear.backward_input": _backward_input,
}


def _register(variant: str, contract: Callable[[Product], str], run: Callable[[Any, Product], Any], lacks: Any) -> None:
    for name, product in FUNCTIONS.items():
        kernel(
            name,
            lambda *a, _product=product, **k: contract(_product(*a, **k)),
            device="cuda",
            variant=variant,
            lacks=lacks,
        )(lambda gpu, *a, _product=product, **k: run(gpu, _product(*a, **k)))


_register("mma", _mma_fits, _mma, lambda gpu: "" if gpu.capability >= (8, 0) else "needs compute capability 8.0")
_register("plain", _fits, _plain, None)
