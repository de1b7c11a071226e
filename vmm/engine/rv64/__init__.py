"""The RISC-V engine: RV64GC harts in S- and U-mode, written in Python and compiled by numba."""
