"""CUDA 12's run-time compiler (NVRTC), which PyPI has where it has no nvcc for CUDA 12.

It compiles device code alone. The host side of a kernel file (the launches) is taken for device
code here, and what that needs of the C++ and CUDA headers for hosts is declared in STAND_INS.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

STAND_INS = """
#define INFINITY __int_as_float(0x7F800000)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef unsigned long uintptr_t;

namespace std {
template <typename T, T kValue>
struct integral_constant {
  static constexpr T value = kValue;
  constexpr operator T() const { return kValue; }
};
using true_type = integral_constant<bool, true>;
using false_type = integral_constant<bool, false>;
template <typename T> struct type_identity { using type = T; };
template <typename T> using type_identity_t = typename type_identity<T>::type;
template <typename T> struct remove_pointer { using type = T; };
template <typename T> struct remove_pointer<T*> { using type = T; };
template <typename T> using remove_pointer_t = typename remove_pointer<T>::type;
template <typename A, typename B> struct is_same : false_type {};
template <typename A> struct is_same<A, A> : true_type {};
template <typename A, typename B> constexpr bool is_same_v = is_same<A, B>::value;
}

struct CUstream_st;
typedef CUstream_st* cudaStream_t;
extern "C" int cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t);
"""
EMPTY_HEADERS = [
    *("cmath", "cstdint", "cstring", "type_traits"),
    *("cuda_runtime.h", "cuda_runtime_api.h"),
]


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(f"nvidia.{name}")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _bytes(strings: list[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(strings))(*(text.encode() for text in strings))


class Nvrtc:
    """NVRTC of CUDA 12."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(_package("cuda_nvrtc") / "lib" / "libnvrtc.so.12"))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = major.value, minor.value

    def compile(self, source: Path, architecture: int) -> bytes:
        """The cubin of a kernel file; raises RuntimeError with the compiler's log."""
        options = [
            *("--std=c++20", f"--gpu-architecture=sm_{architecture}", "--pre-include=stand_ins.h"),
            *("--device-as-default-execution-space", "--relocatable-device-code=true"),
            *(f"-I{source.parent}", f"-I{_package('cuda_runtime') / 'include'}"),
        ]
        headers = ["stand_ins.h", *EMPTY_HEADERS]
        program = ctypes.c_void_p()
        self.library.nvrtcCreateProgram(
            ctypes.byref(program),
            source.read_bytes(),
            source.name.encode(),
            len(headers),
            _bytes([STAND_INS, *[""] * len(EMPTY_HEADERS)]),
            _bytes(headers),
        )
        try:
            if self.library.nvrtcCompileProgram(program, len(options), _bytes(options)) != 0:
                raise RuntimeError(self._text(program, "ProgramLog").decode())
            return self._text(program, "CUBIN")
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self.library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw
