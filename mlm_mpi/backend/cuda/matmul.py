"""Launches of the matrix products: these functions are one product with an epilogue; three kernels can run it.

    cublas   only what is measured to be faster so (`prefers_cublas`)
    hopper   bfloat16, wgmma fed by TMA: addresses and pitches in multiples of 16 bytes
    mma      bfloat16, mma.sync fed by cp.async: also rows in multiples of 16 bytes
    plain    float32 or bfloat16, any size, address and pitch

Shares of k are products of their own, which matmul_shares.cu joins in a tree: each sum crosses memory, a price that
nothing but a proof on cut operands pays.

A kernel sums tiles of the result. Which tile, and whether a tile is summed in pieces by several blocks (kernels/cuda/
matmul.cuh), is `plan`: a function of the shape alone, never of the GPU at hand, and so are a kernel's bits.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlm_mpi.backend.cuda.contracts import ELEMENTS, dense, element, on_device, shaped
from mlm_mpi.backend.registry import Table

KERNELS = Table()

KEEPING = ("GELU", "RELU2")  # epilogues whose input is a result too
MAX_PITCH = 1 << 24  # elements: offsets within a tile are 32-bit
PIECE_THREADS, PIECE_RUN = 256, 4  # matmul_pieces.cu
SHARE_THREADS, SHARE_RUN, MOST_SHARES = 128, 4, 1 << 16  # matmul_shares.cu, tree.cuh


# ---- what is asked for


@dataclass(frozen=True)
class Product:
    """out = epilogue(a b). Shapes: a (M, K), b (K, N); `other` (M, N): the residual, or the input of the GELU.

    `out`: an (M, N) array, or None: a new one of the operands' dtype. K is summed in `shares`, joined in a tree; of
    each of `segments` equal parts of K a share has an equal part, one after another.
    """

    epilogue: str  # of kernels/cuda/matmul.cuh
    a: Any
    b: Any
    out: Any = None
    bias: Any = None
    other: Any = None
    accumulate: bool = False
    shares: int = 1
    segments: int = 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        return self.a.shape[0], self.b.shape[1], self.a.shape[1]

    @property
    def arrays(self) -> list[Any]:
        return [x for x in (self.a, self.b, self.out, self.bias, self.other) if x is not None]


def _add(
    a: Any, b: Any, out: Any, accumulate: bool, shares: int = 1, segments: int = 1
) -> Product:  # fmt: skip
    # `full`: of arrays in float32 nothing is rounded here
    return Product("STORE", a, b, out=out, accumulate=accumulate, shares=shares, segments=segments)


def _forward(x: Any, w: Any, b: Any = None, residual: Any = None, shares: int = 1) -> Product:
    plain = "STORE" if b is None else "BIAS"
    return Product(plain if residual is None else "RESIDUAL", x, w, bias=b, other=residual, shares=shares)


def _forward_gelu(x: Any, w: Any, b: Any = None) -> Product:
    return Product("GELU", x, w, bias=b)


def _forward_relu2(x: Any, w: Any) -> Product:
    return Product("RELU2", x, w)


def _backward_input(dy: Any, w: Any, pre: Any = None, shares: int = 1, segments: int = 1) -> Product:
    return Product("STORE" if pre is None else "SLOPE", dy, w.T, other=pre, shares=shares, segments=segments)


# ---- contracts


def layout(x: Any) -> tuple[int, bool] | None:
    """(pitch in elements, whether rows rather than columns are contiguous) of a matrix; None: neither is."""
    (rows, columns), (down, along) = x.shape, x.strides
    for stride, unit, length, by_rows in ((down, along, columns, True), (along, down, rows, False)):
        if unit == x.itemsize and stride % unit == 0 and stride >= unit * length:
            return stride // unit, by_rows
    return None


def _pitch(x: Any) -> int:
    return layout(x)[0]  # type: ignore[index]  # contracts have looked


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
    m, n, k = product.sizes
    if not 1 <= product.shares < MOST_SHARES or k % (product.shares * product.segments):
        return "k is no whole shares"
    return (
        shaped((m, n), out, product.other)
        or shaped((n,), product.bias)
        or dense(product.bias, product.other, dtype=a.dtype)
    )


def _aligned(x: Any) -> bool:
    """Whether the array and each of its stored rows start at a multiple of 16 bytes."""
    pitches = () if x.ndim == 1 else (_pitch(x) * x.itemsize,)
    return all(number % 16 == 0 for number in (x.data.ptr, *pitches))


def _all_aligned(product: Product) -> bool:
    _, n, _ = product.sizes
    new = product.out is None  # its pitch will be n
    return all(map(_aligned, product.arrays)) and (not new or n * product.a.itemsize % 16 == 0)


# ---- the plan


@dataclass(frozen=True)
class Tile:
    """m x n elements of the result, k a step; `blocks` of them run on a multiprocessor; `rate`: speed per element.

    `cut`: what a step costs where several blocks share a tile, over what it costs where none do: then blocks are at
    different places along k and find less in the L2 cache. Hopper's two are measured (LOG.md, 2026-11-27); the others
    are assumptions: a smaller tile reads more per multiplication.
    """

    m: int
    n: int
    k: int
    blocks: int
    rate: float = 1.0
    cut: float = 1.0

    def count(self, m: int, n: int) -> int:
        return -(-m // self.m) * -(-n // self.n)


PROCESSORS = 132  # of an H100 SXM or an H200, for which tiles and pieces are chosen whatever GPU runs them
PIECES_COST = 32  # steps: partial sums are written and read once, and a second kernel starts


def plan(sizes: tuple[int, int, int], tiles: tuple[Tile, ...]) -> tuple[Tile, int]:
    """The tile to use, and the number of shares its steps are cut into: one a tile, or one a block.

    Says in which order a sum is added, so it asks the shape and nothing of the GPU.
    """
    m, n, k = sizes
    best = []
    for tile in tiles:
        count, steps, blocks = tile.count(m, n), -(-k // tile.k), tile.blocks * PROCESSORS
        step_cost = tile.m * tile.n * tile.k / tile.rate
        best.append((-(-count // blocks) * steps * step_cost, tile, count))
        if count % blocks and blocks <= count * steps < 1 << 31:  # 32-bit in matmul.cuh
            best.append(((-(-count * steps // blocks) + PIECES_COST) * step_cost * tile.cut, tile, blocks))
    _, tile, shares = min(best, key=lambda entry: entry[0])
    return tile, shares


# ---- launches


@dataclass(frozen=True)
class Launch:
    """A product on its way: where the results go, by which tile, in how many shares."""

    product: Product
    out: Any
    pre: Any  # the input of the activation where it is a result too
    tile: Tile
    shares: int

    @property
    def steps(self) -> int:
        return -(-self.product.sizes[2] // self.tile.k)

    @property
    def macros(self) -> dict[str, Any]:
        """What matmul.cuh wants to know."""
        return {
            "ELEMENT": element(self.product.a), "RESULT": element(self.out), "EPILOGUE": self.product.epilogue,
            "TILE_M": self.tile.m, "TILE_N": self.tile.n,
        }  # fmt: skip

    @property
    def along_k(self) -> dict[str, int]:
        """Which operands have k contiguous."""
        (_, a_by_rows), (_, b_by_rows) = layout(self.product.a), layout(self.product.b)  # type: ignore[misc]
        return {"A_ALONG_K": int(a_by_rows), "B_ALONG_K": int(not b_by_rows)}

    def function(self, gpu: Any, stem: str, shared_bytes: int = 0, **macros: Any) -> Callable[..., None]:
        return gpu.function(stem, stem, shared_bytes=shared_bytes, **self.macros, **macros)


Start = Callable[[Any, Launch], None]  # of a kernel that sums tiles


def _multiply(gpu: Any, product: Product, tiles: tuple[Tile, ...], start: Start) -> Any:
    """Runs a product and returns its results: new arrays, unless `out` was given."""
    (m, n, _), empty, dtype = product.sizes, gpu.cupy.empty, product.a.dtype
    out = empty((m, n), dtype) if product.out is None else product.out
    pre = empty((m, n), dtype) if product.epilogue in KEEPING else None
    whole = Launch(product, out, pre, *plan(product.sizes, tiles))
    if product.shares > 1:
        _in_shares(gpu, product, out, tiles, start)
    elif whole.shares == whole.tile.count(m, n):
        start(gpu, whole)
    else:
        _in_pieces(gpu, whole, start)
    if product.out is not None:
        return None
    return out if pre is None else (out, pre)


def _in_pieces(gpu: Any, whole: Launch, start: Start) -> None:
    """The partial sums first, into a column of tiles, one for each slot of `Shares`; then what becomes of them."""
    product, tile, count = whole.product, whole.tile, whole.tile.count(*whole.product.sizes[:2])
    partial = gpu.cupy.empty(((whole.shares + count) * tile.m, tile.n), np.float32)
    start(gpu, replace(whole, product=Product("STORE", product.a, product.b), out=partial, pre=None))
    run = whole.function(gpu, "matmul_pieces", VECTOR=int(_all_aligned(product)))
    run(
        (count, tile.m * tile.n // (PIECE_THREADS * PIECE_RUN)),
        (PIECE_THREADS,),
        (partial, *map(np.int32, (*product.sizes[:2], whole.steps, whole.shares)), whole.out,
         *map(np.int32, (_pitch(whole.out), product.accumulate)), product.bias, product.other, whole.pre),
    )  # fmt: skip


def _in_shares(gpu: Any, product: Product, out: Any, tiles: tuple[Tile, ...], start: Start) -> None:
    """Sums of shares, products of their own whose operands a rank might have alone; then what becomes of them."""
    m, n, _ = product.sizes
    pitch = -(-n // SHARE_RUN) * SHARE_RUN
    sums = gpu.cupy.empty((product.shares, m, pitch), np.float32)
    for share in range(product.shares):
        a, b = _part(gpu, product.a, share, product), _part(gpu, product.b.T, share, product).T
        _multiply(gpu, Product("STORE", a, b, out=sums[share][:, :n]), tiles, start)
    run = Launch(product, out, None, Tile(1, 1, 1, 1), 1).function(
        gpu, "matmul_shares", VECTOR=int(_all_aligned(product))
    )
    run(
        (-(-m * pitch // (SHARE_THREADS * SHARE_RUN)),),
        (SHARE_THREADS,),
        (sums, *map(np.int32, (m, n, pitch, product.shares)), out, *map(np.int32, (_pitch(out), product.accumulate)),
         product.bias, product.other),
    )  # fmt: skip


def _part(gpu: Any, x: Any, share: int, product: Product) -> Any:
    """Of an operand (i, k) a share's k: a view, or a copy where it is not in one piece; contiguous as x is."""
    long = x.shape[1] // product.segments
    length = long // product.shares
    starts = range(share * length, x.shape[1], long)
    if product.segments == 1:
        return x[:, starts[0] : starts[0] + length]
    if layout(x)[1]:  # type: ignore[index]
        return gpu.cupy.concatenate([x[:, k : k + length] for k in starts], axis=1)
    return gpu.cupy.concatenate([x.T[k : k + length] for k in starts], axis=0).T


def _by_blocks(gpu: Any, launch: Launch, stem: str, threads: int, shared_bytes: int, vector: bool) -> None:
    """Starts `matmul.cu` or `matmul_bf16.cu`, which take the same arguments: a block for every share."""
    product, out = launch.product, launch.out
    run = launch.function(gpu, stem, shared_bytes, VECTOR=int(vector), **launch.along_k)
    pitches = [_pitch(x) for x in (product.a, product.b, out)]
    run(
        (launch.shares,),
        (threads,),
        (product.a, product.b, *map(np.int32, (*product.sizes, *pitches[:2])), out,
         *map(np.int32, (*out.shape, pitches[2], product.accumulate)), product.bias, product.other, launch.pre,
         np.int32(launch.shares)),
        shared_mem=shared_bytes,
    )  # fmt: skip


# ---- matmul.cu

PLAIN_TILES = (Tile(128, 64, 8, blocks=3), Tile(64, 64, 8, blocks=4, rate=0.8))
PLAIN_THREADS = 128


def _start_plain(gpu: Any, launch: Launch) -> None:
    vector = launch.product.a.dtype == np.float32 and _all_aligned(launch.product)
    _by_blocks(gpu, launch, "matmul", PLAIN_THREADS, 0, vector)


def _plain(gpu: Any, product: Product) -> Any:
    return _multiply(gpu, product, PLAIN_TILES, _start_plain)


# ---- matmul_bf16.cu

MMA_TILES = (Tile(128, 128, 32, blocks=2), Tile(64, 64, 32, blocks=3, rate=0.6))
MMA_THREADS, MMA_STAGES = 128, 4


def _bf16_fits(product: Product) -> str:
    """What both kernels on tensor cores ask for."""
    if reason := _fits(product):
        return reason
    if product.a.dtype == np.float32:
        return "float32"
    aligned = _all_aligned(product) and _parts_aligned(product)
    return "" if aligned else "addresses or pitches not in multiples of 16 bytes"


def _parts_aligned(product: Product) -> bool:
    """As `_aligned`, of what `_part` makes."""
    if product.shares == 1:
        return True
    m, n, k = product.sizes
    pitches = [k // product.shares]
    if product.segments > 1:
        along_k = layout(product.a)[1], not layout(product.b)[1]  # type: ignore[index]
        pitches += [extent for extent, along in zip((m, n), along_k, strict=True) if not along]
    return not any(pitch % 8 for pitch in pitches)


def _mma_fits(product: Product) -> str:
    if reason := _bf16_fits(product):
        return reason
    rows = (x.shape[1] if layout(x)[1] else x.shape[0] for x in (product.a, product.b))  # type: ignore[index]
    return "rows not in multiples of 16 bytes" if any(length % 8 for length in rows) else ""


def _start_mma(gpu: Any, launch: Launch) -> None:
    tile = launch.tile
    ring, sums = MMA_STAGES * 2 * (tile.m + tile.n) * tile.k, 4 * tile.m * (tile.n + 8)  # one after the other
    _by_blocks(gpu, launch, "matmul_bf16", MMA_THREADS, max(ring, sums), vector=True)


def _mma(gpu: Any, product: Product) -> Any:
    return _multiply(gpu, product, MMA_TILES, _start_mma)


def _lacks_mma(gpu: Any) -> str:
    return "" if gpu.capability >= (8, 0) else "needs compute capability 8.0"


# ---- matmul_hopper.cu

HOPPER_TILES = (Tile(128, 256, 64, blocks=1, cut=2.0), Tile(128, 128, 64, blocks=1, rate=0.95, cut=2.0))
HOPPER_THREADS = 384
SHARED_BYTES = 227 << 10  # of a block
CHUNK = 64, 128  # rows, bytes
BOX = 64  # elements of 128 bytes


def _hopper_fits(product: Product) -> str:
    if product.accumulate and product.out.dtype != np.float32:
        return "adds to bfloat16"
    return _bf16_fits(product)


def _hopper_ring(tile: Tile, epilogue: str) -> tuple[dict[str, int], int]:
    """Stages of the ring and buffers of a warpgroup (`struct Shared` of matmul_hopper.cu), and the bytes of both.

    An epilogue that reads or keeps a matrix has a tile's width of buffers; what they leave is the ring's.
    """
    buffers = 4 if epilogue in ("RESIDUAL", "SLOPE", *KEEPING) else 2
    stage_bytes, chunks, bias = 2 * (tile.m + tile.n) * tile.k, 2 * buffers * CHUNK[0] * CHUNK[1], 2 * 2 * tile.n
    barriers = 256  # more than any ring has
    stages = (SHARED_BYTES - chunks - bias - barriers) // stage_bytes
    return {"STAGES": stages, "BUFFERS": buffers}, stages * stage_bytes + chunks + bias + barriers


def _operand_map(gpu: Any, x: Any, size: int, depth: int, along_k: int) -> Any:
    """The map of an operand (i, k): boxes of `size` rows of 64, or of `depth` rows of 64 where i is contiguous."""
    return gpu.tensor_map(x, (size, BOX)) if along_k else gpu.tensor_map(x.T, (depth, BOX))


def _chunk_map(gpu: Any, x: Any) -> Any:
    return gpu.tensor_map(x, (CHUNK[0], CHUNK[1] // x.itemsize))


def _start_hopper(gpu: Any, launch: Launch) -> None:
    product, tile, along = launch.product, launch.tile, launch.along_k
    ring, shared_bytes = _hopper_ring(tile, product.epilogue)
    run = launch.function(gpu, "matmul_hopper", shared_bytes, VECTOR=1, **ring, **along)
    other = launch.pre if product.other is None else product.other
    out = _chunk_map(gpu, launch.out)
    run(
        (min(launch.shares, gpu.processors),),
        (HOPPER_THREADS,),
        (_operand_map(gpu, product.a, tile.m, tile.k, along["A_ALONG_K"]),
         _operand_map(gpu, product.b.T, tile.n, tile.k, along["B_ALONG_K"]),
         out, out if other is None else _chunk_map(gpu, other), product.bias,
         *map(np.int32, (*product.sizes, product.accumulate, launch.shares))),
        shared_mem=shared_bytes,
    )  # fmt: skip


def _hopper(gpu: Any, product: Product) -> Any:
    return _multiply(gpu, product, HOPPER_TILES, _start_hopper)


def _lacks_hopper(gpu: Any) -> str:
    return "" if gpu.capability == (9, 0) else "needs compute capability 9.0"


# ---- cuBLAS through CuPy

MEASURED = Path(__file__).with_name("cublas.json")


@functools.cache
def _measured(table: Path) -> dict[str, Any]:
    """{"architecture": "sm_90a", "faster": [a `case_of`, ...]}, written by gpu-check; nothing where none has been."""
    return json.loads(table.read_text()) if table.exists() else {"architecture": "", "faster": []}


def case_of(product: Product) -> str:
    """ "bfloat16 4096x768x3072 nt": what a measurement is of."""
    along = "".join("nt"[not layout(x)[1]] for x in (product.a, product.b))  # type: ignore[index]
    return f"{product.a.dtype.name} {'x'.join(map(str, product.sizes))} {along}"


def prefers_cublas(product: Product) -> str:
    """Why a product, plain and without anything to add to, is not given to cuBLAS; "" where that is faster."""
    if reason := _fits(product):
        return reason
    if product.shares > 1:
        return "in shares"
    if product.accumulate or product.out.dtype != product.a.dtype:
        return "adds, or widens"
    return "" if case_of(product) in _measured(MEASURED)["faster"] else "not measured to be faster"


def _cublas(gpu: Any, product: Product) -> None:
    gpu.cupy.matmul(product.a, product.b, out=product.out)


def _lacks_cublas(gpu: Any) -> str:
    return "" if _measured(MEASURED)["architecture"] == gpu.architecture else "no shape was measured on this GPU"


# ---- the table: every function by every kernel, the fastest first

FUNCTIONS: dict[str, Callable[..., Product]] = {
    "matmul.add": _add,
    "linear.forward": _forward,
    "linear.forward_gelu": _forward_gelu,
    "linear.forward_relu2": _forward_relu2,
    "linear.backward_input": _backward_input,
}


def _enter(
    name: str, variant: str, contract: Callable[[Product], str], run: Callable[[Any, Product], Any], lacks: Any
) -> None:
    def fits(*arguments: Any, **named: Any) -> str:
        return contract(FUNCTIONS[name](*arguments, **named))

    def launch(gpu: Any, *arguments: Any, **named: Any) -> Any:
        return run(gpu, FUNCTIONS[name](*arguments, **named))

    KERNELS.kernel(name, fits, variant, lacks)(launch)


_enter("matmul.add", "cublas", prefers_cublas, _cublas, _lacks_cublas)
for _name in FUNCTIONS:
    _enter(_name, "hopper", _hopper_fits, _hopper, _lacks_hopper)
    _enter(_name, "mma", _mma_fits, _mma, _lacks_mma)
    _enter(_name, "plain", _fits, _plain, lambda gpu: "")
