"""Compiles a kernel by NVRTC into out/, and prints its registers and spills."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

NVRTC = ctypes.CDLL(os.environ.get("KEYFOLD_NVRTC", "libnvrtc.so.13"))
HERE = Path(__file__).resolve().parent


def compile(name: str, defines: dict[str, object], arch: str = "sm_90a", src: str = "") -> bool:
    """Compile `src` of the working folder; a define of None has no value. False where it fails."""
    headers = [*Path().glob("*.cuh"), HERE / "params.cuh"]
    names = (ctypes.c_char_p * len(headers))(*[h.name.encode() for h in headers])
    texts = (ctypes.c_char_p * len(headers))(*[h.read_bytes() for h in headers])
    program = ctypes.c_void_p()
    NVRTC.nvrtcCreateProgram(
        ctypes.byref(program), Path(src).read_bytes(), src.encode(), len(headers), texts, names
    )
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v", "-default-device"]
    options += [f"-D{k}" if v is None else f"-D{k}={v}" for k, v in defines.items()]
    encoded = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    failed = NVRTC.nvrtcCompileProgram(program, len(options), encoded)
    log = _text("ProgramLog", program).decode().rstrip("\0")
    if failed:
        print(name, "FAILED", log[:3000], sep="\n")
        return False
    Path("out").mkdir(exist_ok=True)
    Path(f"out/{name}.cubin").write_bytes(_text("CUBIN", program))
    report = re.findall(r"\d+ (?:registers|bytes spill \w+)|.*serialized.*", log)
    print(name, "; ".join(report), flush=True)
    return True


def _text(what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    getattr(NVRTC, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(NVRTC, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw
