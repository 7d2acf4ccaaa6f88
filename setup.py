"""The C kernels, which setup.cfg cannot declare. Optional: without a compiler NumPy computes everything."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CPU = Path("kernels/cpu")


class BuildKernels(build_ext):
    """A compiler for every core: one after the other the six levels take 52 s on one of Zen 3."""

    def build_extensions(self):
        one_by_one = self.compiler.compile

        def compile_all(sources, *arguments, **named):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: one_by_one([source], *arguments, **named), sources)
                return [name for names in objects for name in names]

        self.compiler.compile = compile_all
        super().build_extensions()


setup(
    cmdclass={"build_ext": BuildKernels},
    packages=[*find_packages(include=["mlm_mpi*"]), "mlm_mpi.kernels"],
    package_dir={"mlm_mpi.kernels": "kernels"},
    package_data={
        "mlm_mpi.backend.cuda": ["cublas.json"],
        "mlm_mpi.data": ["builtin.bin"],
        "mlm_mpi.inside": ["page.css", "page.html", "page.js"],
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
