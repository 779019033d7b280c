"""The Triton kernels, one file an op, with the launch code that picks their shapes.

Imported only when a CUDA tensor asks for it, so that a host without Triton still serves from its CPU. Each module's functions
take what the op of the same name in `kernels` takes and give the same within rounding; nothing here checks arguments.
"""
