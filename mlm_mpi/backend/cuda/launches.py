"""Imports every module that registers CUDA kernels, the preferred variant of a function first."""

from mlm_mpi.backend.cuda import attention, elementwise, matmul, rows

__all__ = ["attention", "elementwise", "matmul", "rows"]
