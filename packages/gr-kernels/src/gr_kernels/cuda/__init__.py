"""What kernels for CUDA share; imports no GPU library, and needs no GPU."""
