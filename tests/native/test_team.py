"""The threads that C++ works on, in a process that was forked from one that had used them."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spt_kernels import native

# threads of OpenMP as PyTorch's operations start them, a fork, and then the first call of ours
_FORKED_BEFORE = """
import ctypes, importlib.util, os, signal, sys
openmp, module = sys.argv[1:]
spec = importlib.util.spec_from_file_location("_native", module)
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
nothing = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda data: None)
ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL).GOMP_parallel(nothing, None, 2, 0)
child = os.fork()
if child:
    sys.exit(os.waitpid(child, 0)[1])
signal.alarm(5)
values = (ctypes.c_uint32 * (1 << 18))()
address = ctypes.addressof(values)
native.dropout(address, address, len(values), 4, 0, (1, 2, 1 << 31), 2)
os._exit(0)
"""


def drop(values: torch.Tensor) -> None:
    native.dropout(values, values, 1, 2, 1 << 31, 0)


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    values = torch.ones(1 << 20)  # made here: torch's own operations wait forever in a fork
    try:
        drop(values)
        child = multiprocessing.get_context("fork").Process(target=drop, args=(values,))
        child.start()
        child.join(timeout=10)
        is_stuck = child.is_alive()
        child.kill()
        child.join()
    finally:
        torch.set_num_threads(before)
    assert not is_stuck
    assert child.exitcode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch brings another OpenMP")
def test_torch_alone_may_have_used_threads_before_the_fork() -> None:
    openmp = next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), None)
    if openmp is None:
        pytest.skip("torch was built with another OpenMP")
    module = native.module.module().__file__
    assert module is not None
    called = [sys.executable, "-c", _FORKED_BEFORE, str(openmp), module]
    assert subprocess.run(called).returncode == 0
