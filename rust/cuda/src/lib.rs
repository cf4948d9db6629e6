//! The CUDA driver found at run time, and the launches of the embedded kernels.
