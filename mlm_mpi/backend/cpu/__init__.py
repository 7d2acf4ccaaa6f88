"""The C kernels and their launches."""
