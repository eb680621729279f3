"""What a kernel is, what it says of a request, and the kernels of torch operators that every device has."""
