"""The Triton kernels, one file an op, with the launch code that picks their shapes.

Imported only when a CUDA tensor asks for it, so that a host without Triton still serves from its CPU. Each module's functions
take what the op of the same name in `kernels` takes and give the same within rounding; nothing here checks arguments.

A kernel is compiled for types, shapes of the model and ways of cutting a launch, never for a step: numbers that a step decides (rows, strides
of its tables, where a slice of a buffer begins) are exempt from Triton's specialisation, which would compile anew in the middle of a
batch, for a second or two.
"""
