"""Two processes prove the Triton kernels, since the interpreter cannot compile.

``pytest tests`` compiles them ahead of time and reads their machine code (and runs the CUDA kernels
on the CPU);
``TRITON_INTERPRET=1 pytest tests/gpu_proof`` runs them on the CPU.
"""

from dlkernels.backend import INTERPRETED

collect_ignore = ["compiled", "cuda_on_cpu"] if INTERPRETED else ["interpreted"]
