"""The kernels themselves, in Triton's language: nothing here knows a scheme, a device or a module."""
