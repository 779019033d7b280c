"""The mathematics of a transformer step: one module an op, each with a plain PyTorch reference beside its Triton kernel.

Knows tensors and nothing else: no requests, no models, no processes. `kernels.<op>` dispatches on the device of its first
argument: a CUDA tensor runs the Triton kernel of `kernels.gpu`, everything else runs the reference.
"""
