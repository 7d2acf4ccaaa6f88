"""The C kernels, which setup.cfg cannot declare. Optional: without a compiler NumPy computes everything."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

CPU = Path("kernels/cpu")

setup(
    packages=[*find_packages(include=["mlm_mpi*"]), "mlm_mpi.kernels"],
    package_dir={"mlm_mpi.kernels": "kernels"},
    package_data={
        "mlm_mpi.backend.cuda": ["cublas.json"],
        "mlm_mpi.data": ["builtin.bin"],
        "mlm_mpi.kernels": ["README.md", "cpu/*", "cuda/*.cu", "cuda/*.cuh", "cuda/*.txt"],
    },
    ext_modules=[
        Extension(
            "mlm_mpi.backend._cpu",
            sources=sorted(map(str, [*CPU.glob("level_*.c"), *CPU.glob("bf16_*.c"), CPU / "dispatch.c"])),
            depends=[str(path) for path in sorted(CPU.glob("*"))],
            # bits are what the sources say: no contraction, no reordering (kernels/cpu/common.h)
            extra_compile_args=[
                "-std=gnu11", "-O3", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
                "-fvisibility=hidden",
            ],
            libraries=["m"],  # fmaf, where the base level has no instruction for it
            optional=True,
        )
    ],
)  # fmt: skip
