"""Two processes prove the Triton kernels, since the interpreter cannot compile.

``pytest tests`` compiles them ahead of time and reads their machine code;
``TRITON_INTERPRET=1 pytest tests/gpu_proof`` runs them on the CPU.
"""

from dlkernels.backend import INTERPRETED

collect_ignore = ["compiled" if INTERPRETED else "interpreted"]
