"""The CUDA kernels: a device that compiles and loads `kernels/cuda`, and the launches registered per op."""
