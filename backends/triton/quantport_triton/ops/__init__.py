"""The kernels in Triton's language. They know no scheme, device or module."""
