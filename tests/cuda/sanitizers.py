"""Runs Python with the emulated kernels built by a sanitizer: `sanitizers.py thread|address arguments of python …`.

Findings go to files in $MLM_MPI_SANITIZER_LOGS, where conftest.py finds those of a test and fails it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = {"thread": "libtsan.so", "address": "libasan.so"}
FLAGS = "-O1 -g -fno-omit-frame-pointer"


def environment(kind, logs):
    """What a process needs so that its kernels run under this sanitizer and its findings go to `logs`/found.*."""
    library = subprocess.run(
        ["g++", f"-print-file-name={LIBRARIES[kind]}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    options = f"log_path={logs}/found:exitcode=0:halt_on_error=0"
    return {
        "LD_PRELOAD": library,
        "MLM_MPI_EMULATOR_FLAGS": f"{FLAGS} -fsanitize={kind} -fsanitize-recover=address",
        "MLM_MPI_SANITIZER_LOGS": str(logs),
        "ASAN_OPTIONS": f"{options}:detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": options,
        "PYTHONMALLOC": "malloc",
        "OPENBLAS_NUM_THREADS": "1",
    }


def findings(logs):
    """What the sanitizer wrote so far."""
    return "\n".join(path.read_text(errors="replace") for path in sorted(Path(logs).glob("found.*")))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        added = environment(sys.argv[1], folder)
        code = subprocess.run([sys.executable, *sys.argv[2:]], env=os.environ | added, check=False).returncode
        if found := findings(folder):
            print(found[:20000], file=sys.stderr)
        sys.exit(code or bool(found))
