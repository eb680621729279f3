"""The Triton kernels, for the rooms whose devices Triton compiles for."""
