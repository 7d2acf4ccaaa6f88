"""Kernels of the tests' own, compiled as `gpu.function` compiles those of kernels/cuda."""

from pathlib import Path

import cupy

from mlm_mpi.backend.cuda.device import options, source


def probe(gpu, stem, name, shared_bytes=0, **defines):
    """`name` of `probes/<stem>.cu`, to be called with (grid, block, args, shared_mem=)."""
    code = source(stem, Path(__file__).parent)
    module = cupy.RawModule(code=code, options=options(gpu.architecture, defines.items()))
    function = module.get_function(name)
    if shared_bytes > 48 << 10:
        function.max_dynamic_shared_size_bytes = shared_bytes
    return function
