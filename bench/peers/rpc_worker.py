"""One RPC worker of llama.cpp: rpc_worker.py HOST:PORT THREADS serves a CPU device there until its standard input ends.

The Python package comes without llama.cpp's own server program, but its library has all of it. The protocol checks nobody:
loopback only."""

import ctypes
import os
import pathlib
import sys
import threading

CPU = 0  # ggml_backend_dev_type


def library(name: str) -> ctypes.CDLL:
    """A library of the installed llama-cpp-python."""
    import llama_cpp

    file = pathlib.Path(llama_cpp.__file__).parent / "lib" / f"lib{name}.so"
    if not file.exists():
        sys.exit(f"{file} is not there: llama-cpp-python was built without -DGGML_RPC=ON (see requirements.txt)")
    return ctypes.CDLL(str(file))


def end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    endpoint, threads = sys.argv[1], int(sys.argv[2])
    rpc, ggml = library("ggml-rpc"), library("ggml")
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    device = ctypes.c_void_p(ggml.ggml_backend_dev_by_type(ctypes.c_int(CPU)))
    if not device:
        sys.exit("ggml has no CPU device")
    threading.Thread(target=end_with_input, daemon=True).start()
    rpc.ggml_backend_rpc_start_server.restype = None
    rpc.ggml_backend_rpc_start_server(
        endpoint.encode(), None, ctypes.c_size_t(threads), ctypes.c_size_t(1), ctypes.byref(device)
    )
    sys.exit(f"llama.cpp's RPC worker cannot serve {endpoint}")


if __name__ == "__main__":
    main()
