"""Each Hopper instruction of ptx.cuh against its meaning: that the emulator, or the GPU, does what PTX ISA says."""

import ctypes

import cupy
import ml_dtypes
import numpy as np
import pytest
from agreement import device
from probes import probe

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(autouse=True)
def hopper(gpu):
    if gpu.capability != (9, 0):
        pytest.skip("needs compute capability 9.0")


def numbers(rng, *shape):
    """bf16 whose products and short sums are exact in float32."""
    return rng.integers(-8, 9, shape).astype(BF16)


def operand(matrix, k_major):
    """Device copy of a (rows, k) matrix, stored (rows, k), or (k, rows) where it is contiguous along its rows."""
    return device(matrix if k_major else matrix.T)


@pytest.mark.parametrize("width", [64, 128, 192, 256])
@pytest.mark.parametrize("a_mn", [0, 1])
@pytest.mark.parametrize("b_mn", [0, 1])
def test_wgmma_from_shared_memory(gpu, rng, width, a_mn, b_mn):
    a, b = numbers(rng, 64, 128), numbers(rng, width, 128)
    c = cupy.full((64, width), np.nan, np.float32)
    shared = (64 + width) * 64 * 2
    run = probe(gpu, "wgmma", "wgmma_probe", shared, WIDTH=width, A_MN=a_mn, B_MN=b_mn)
    stored = operand(a, not a_mn), operand(b, not b_mn)
    maps = gpu.tensor_map(stored[0], (64, 64)), gpu.tensor_map(stored[1], (64, 64) if b_mn else (width, 64))
    run((1,), (128,), (*maps, c), shared_mem=shared)
    np.testing.assert_array_equal(c.get(), 2 * a.astype("f4") @ b.astype("f4").T)


@pytest.mark.parametrize("width", [64, 128, 192, 256])
@pytest.mark.parametrize("b_mn", [0, 1])
def test_wgmma_from_registers(gpu, rng, width, b_mn):
    a, b = numbers(rng, 64, 16), numbers(rng, width, 64)
    c = cupy.full((64, width), np.nan, np.float32)
    stored = operand(b, not b_mn)
    run = probe(gpu, "wgmma", "wgmma_registers", width * 128, WIDTH=width, A_MN=0, B_MN=b_mn)
    maps = gpu.tensor_map(stored, (64, 64) if b_mn else (width, 64))
    run((1,), (128,), (device(a), maps, c), shared_mem=width * 128)
    np.testing.assert_array_equal(c.get(), a.astype("f4") @ b[:, 48:].astype("f4").T)


def shifted(array, box, at, to):
    """What a copied box leaves in an array of -1: what is outside `array` is 0, outside the target vanishes."""
    wanted = np.full(array.shape, -1, array.dtype)
    for index in np.ndindex(*box):
        source, target = np.add(at, index), np.add(to, index)
        if all(0 <= t < n for t, n in zip(target, array.shape, strict=True)):
            inside = all(0 <= s < n for s, n in zip(source, array.shape, strict=True))
            wanted[tuple(target)] = array[tuple(source)] if inside else 0
    return wanted


@pytest.mark.parametrize("swizzle", [0, 128])
@pytest.mark.parametrize(
    ("shape", "box", "at", "to"),
    [
        ((20, 80), (8, 64), (3, 8), (2, 16)),
        ((20, 80), (16, 64), (10, 56), (6, 24)),
        ((20, 80), (8, 64), (-3, -24), (14, 56)),
        ((3, 9, 72), (2, 8, 64), (2, -3, -8), (0, 4, 48)),
        ((2, 5, 3, 64), (1, 8, 2, 64), (1, -1, 2, 0), (0, 1, 2, 8)),
    ],
)
def test_tma_copies_a_box(gpu, rng, dtype, swizzle, shape, box, at, to):
    if dtype.itemsize == 4:  # a swizzled row has 128 bytes
        box = (*box[:-1], 32)
    x = rng.integers(0, 100, shape).astype(dtype)
    source, y = device(x), device(np.full(shape, -1, dtype))
    size = int(np.prod(box)) * dtype.itemsize
    run = probe(gpu, "hopper", "copy_box", size)
    maps = gpu.tensor_map(source, box, swizzle), gpu.tensor_map(y, box, swizzle)
    corners = [device(np.array(corner[::-1], np.int32)) for corner in (at, to)]
    run((1,), (32,), (*maps, np.int32(len(shape)), *corners, np.int32(size)), shared_mem=size)
    np.testing.assert_array_equal(y.get(), shifted(x, box, at, to))


def test_tma_reads_a_strided_view(gpu, rng):
    """Heads of a fused (B, T, 3, H, D) buffer: the pitches need not be ordered."""
    fused = device(rng.integers(0, 100, (2, 6, 3, 2, 64)).astype(BF16))
    keys = fused[:, :, 1].transpose(0, 2, 1, 3)  # (B, H, T, D)
    y = device(np.full((2, 2, 6, 64), -1, BF16))
    box = (1, 1, 4, 64)
    run = probe(gpu, "hopper", "copy_box", 512)
    at = device(np.array([0, 3, 1, 1], np.int32))
    run(
        (1,),
        (32,),
        (gpu.tensor_map(keys, box), gpu.tensor_map(y, box), np.int32(4), at, at, np.int32(512)),
        shared_mem=512,
    )
    np.testing.assert_array_equal(y.get(), shifted(keys.get(), box, (1, 1, 3, 0), (1, 1, 3, 0)))


@pytest.mark.parametrize("span", [0, 32, 64, 128])
def test_swizzle(gpu, rng, span):
    """Piece c of row r lies at piece c xor (line of 128 bytes mod pieces) of its row."""
    width = (span or 128) // 2
    x = rng.integers(0, 1000, (24, width)).astype(BF16)
    source, y = device(x), device(np.zeros(x.size, BF16))
    run = probe(gpu, "hopper", "swizzle_probe", 1 << 13)
    run((1,), (32,), (gpu.tensor_map(source, x.shape, span), y, np.int32(x.size)), shared_mem=1 << 13)
    pieces = x.reshape(-1, 8)
    number = np.arange(len(pieces))
    place = number ^ (number // 8 % (span // 16) if span else 0)
    wanted = np.empty_like(pieces)
    wanted[place] = pieces
    np.testing.assert_array_equal(y.get(), wanted.ravel())


@pytest.mark.parametrize("transposed", [0, 1])
def test_stmatrix(gpu, rng, transposed):
    registers = rng.integers(0, 1 << 16, (32, 4, 2)).astype(np.uint16)  # lane, matrix, half
    y = device(np.zeros(256, np.uint16))
    run = probe(gpu, "hopper", "stmatrix_probe")
    run((1,), (32,), (device(registers.view(np.uint32)), y, np.int32(transposed)))
    matrices = registers.reshape(8, 4, 4, 2).transpose(2, 0, 1, 3).reshape(4, 8, 8)  # lane = 4 row + column / 2
    wanted = matrices.transpose(0, 2, 1) if transposed else matrices
    np.testing.assert_array_equal(y.get(), wanted.ravel())


def test_named_barriers_hand_over(gpu):
    y = device(np.zeros(5, np.int32))
    probe(gpu, "hopper", "handover")((1,), (96,), (y, np.int32(5)))
    np.testing.assert_array_equal(y.get(), [64 * 100 * i + 63 * 32 for i in range(5)])


def test_exp2(gpu):
    x = np.array([0, 1, -1, 0.5, -126, -127, -150, 127.5, 128, -np.inf, np.inf, 1e-40, np.nan], np.float32)
    y = device(np.zeros_like(x))
    probe(gpu, "hopper", "exp2_probe")((1,), (32,), (device(x), y, np.int32(x.size)))
    with np.errstate(over="ignore"):
        wanted = np.exp2(x)
    wanted[np.abs(wanted) < 2.0**-126] = 0
    np.testing.assert_allclose(y.get(), wanted, rtol=2e-7)


@pytest.mark.parametrize(
    ("shape", "box", "swizzle", "first"),
    [
        ((16, 64), (300, 64), 128, 0),  # a box of more than 256
        ((16, 68), (16, 66), 0, 0),  # a row of the box that is no multiple of 16 bytes
        ((16, 100), (16, 64), 128, 0),  # rows 200 bytes apart
        ((16, 128), (16, 128), 128, 0),  # a row of the box wider than the swizzle
        ((16, 128), (16, 64), 128, 4),  # the first element not at a multiple of 16 bytes
        ((2, 2, 2, 2, 2, 64), (1, 1, 1, 1, 1, 64), 128, 0),  # more than 5 dims
    ],
)
def test_tensor_map_refuses(gpu, shape, box, swizzle, first):
    array = device(np.zeros(shape, BF16))[..., first:]
    with pytest.raises(ValueError, match="cuTensorMapEncodeTiled: error 1"):
        gpu.tensor_map(array, box, swizzle)


def test_the_driver_is_looked_up_once(gpu, monkeypatch):
    """More than half of a map's time went into finding the library again."""
    x = device(np.zeros((8, 8), BF16))
    gpu.tensor_map(x, (8, 8))
    with monkeypatch.context() as patched:
        patched.setattr(ctypes, "CDLL", None)
        gpu.tensor_map(x, (8, 8))
