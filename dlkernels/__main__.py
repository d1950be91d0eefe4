"""``python -m dlkernels``."""

from dlkernels.cli import main

main()
