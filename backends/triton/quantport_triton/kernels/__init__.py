"""The kernels of the house that run on Triton, for any room whose device Triton compiles for."""
