"""`llama-quantize IN OUT TYPE THREADS` by the libllama that node-llama-cpp brings, which has the function, not the program."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

TYPES = {"Q4_K_M": 15, "Q6_K": 18}


class Params(ctypes.Structure):
    """llama_model_quantize_params: threads, type and two more numbers; the rest as llama.cpp has it."""

    _fields_ = (("numbers", ctypes.c_int32 * 4), ("rest", ctypes.c_uint8 * 128))


def main(source: str, out: str, kind: str, threads: str) -> int:
    (libraries,) = Path(os.environ["LLAMA_CPP_NODE"]).glob("node_modules/@node-llama-cpp/linux-*/bins/linux-*")
    ctypes.CDLL(str(libraries / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    ggml = ctypes.CDLL(str(next(libraries.glob("libggml.*.so"))), mode=ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(str(libraries).encode())
    llama = ctypes.CDLL(str(next(libraries.glob("libllama.*.so"))))
    llama.llama_model_quantize_default_params.restype = Params
    params = llama.llama_model_quantize_default_params()
    params.numbers[0], params.numbers[1] = int(threads), TYPES[kind]
    return llama.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
