"""NVRTC assembles every build of the kernels, without a GPU or a header: nothing spills or lives in local memory."""

from types import SimpleNamespace

import pytest

from mlm_mpi.backend.cuda import nvrtc
from mlm_mpi.backend.cuda.device import ARITHMETIC, Device, cubin_path, options, source, sources
from mlm_mpi.errors import ConfigError

try:
    nvrtc._library()
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
BUILDS = nvrtc.builds()
DEFINES = (("ELEMENT", "float"), ("WIDTH", 4))
STEMS = sorted({stem for stem, _ in BUILDS})


def test_every_source_is_built():
    assert {path.stem for path in sources().glob("*.cu")} == set(STEMS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stem", STEMS)
def test_nothing_spills(stem, architecture):
    if not nvrtc.runs_on(stem, architecture):
        pytest.skip("wgmma is sm_90a's alone")
    for _, defines in [build for build in BUILDS if build[0] == stem]:
        cubin, log = nvrtc.compile_cubin(stem, architecture, defines)
        assert cubin[:4] == b"\x7fELF"
        assert "warning" not in log.lower() and "(C75" not in log, log  # C75xx: wgmma serialised, setmaxnreg ignored
        kernels = nvrtc.resources(log)
        assert kernels
        for name, needs in kernels.items():
            assert needs.registers > 0
            assert (needs.stack_bytes, needs.spilled_bytes) == (0, 0), f"{name} with {defines}: {needs}"


def test_spills_are_counted():
    """That `resources` reads what ptxas writes."""
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for one
    16 bytes stack frame, 24 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 16 bytes cumulative stack size, 48 bytes smem
ptxas info    : Compiling entry function 'two' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers
"""
    assert nvrtc.resources(log) == {"one": nvrtc.Resources(168, 16, 32, 48), "two": nvrtc.Resources(20, 0, 0, 0)}


def test_hopper_sources_need_the_specific_architecture():
    """CuPy appends -arch=sm_90 to our -arch=sm_90a; the "a" must survive, or wgmma does not assemble."""
    assert "-arch=sm_90a" in options("sm_90a", ())
    stem, defines = next(build for build in BUILDS if "hopper" in build[0])
    nvrtc.compile_cubin(stem, "sm_90a", defines)
    with pytest.raises(RuntimeError, match="wgmma"):
        nvrtc.compile_cubin(stem, "sm_90", defines)


def test_cupy_preprocesses_for_another_architecture():
    """CuPy first compiles an empty source with our options and -arch=compute_90 (compiler.py, _preprocess)."""
    nvrtc.compile_text("", "preprocess.cu", [*options("sm_90a", ()), "-arch=compute_90"])


@pytest.mark.parametrize("stem", ["adamw", "crossentropy"])
def test_what_is_compiled_beforehand_is_what_cupy_compiles(stem):
    """With what CuPy 14.2 appends (compiler.py): numbers near 2^-126 must not depend on who compiled."""
    defines = next(defines for known, defines in BUILDS if known == stem)
    appended = ["-ftz=true", "-arch=sm_90", "--device-as-default-execution-space", "--ptxas-options=-v"]
    by_cupy, _ = nvrtc.compile_text(source(stem), f"{stem}.cu", [*options("sm_90a", defines), *appended])
    assert nvrtc.compile_cubin(stem, "sm_90a", defines)[0] == by_cupy


def test_a_build_at_run_time_has_the_options_of_one_made_beforehand(monkeypatch):
    """`Device` through CuPy, `make kernels` through NVRTC: one list, but for what CuPy appends and for the log."""
    told = {}

    def module(code, options):
        told["at run time"] = options
        return SimpleNamespace(compile=lambda: None)

    def compile_text(text, name, given):
        told["beforehand"] = given
        return b"", ""

    gpu = object.__new__(Device)
    gpu.capability, gpu.builds, gpu.cupy = (9, 0), set(), SimpleNamespace(RawModule=module)
    gpu._module("gelu", DEFINES)
    monkeypatch.setattr(nvrtc, "compile_text", compile_text)
    nvrtc.compile_cubin("gelu", gpu.architecture, DEFINES)
    assert set(ARITHMETIC) < set(told["at run time"]), "a default of nobody's decides bits"
    appended = ["-arch=sm_90", "--device-as-default-execution-space", "--ptxas-options=-v"]
    assert [*told["at run time"], *appended] == list(told["beforehand"])


def test_a_cubin_belongs_to_its_source_and_options(monkeypatch):
    paths = {
        cubin_path("gelu", architecture, defines)
        for architecture in ("sm_80", "sm_90a")
        for defines in ((), (("A", 1),))
    }
    monkeypatch.setattr("mlm_mpi.backend.cuda.device.source", lambda stem: source(stem) + "\n")
    paths.add(cubin_path("gelu", "sm_80", ()))
    assert len(paths) == 5
