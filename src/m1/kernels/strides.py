"""How kernels learn the alignment of rows whose stride is no multiple of 16 elements; nothing else lives here.

Triton knows of an integer argument only whether 16 divides it. Rows of a projection that is, say, 2,104 wide are 16-byte
aligned all the same; so such strides are passed as multiples of a compile-time unit and multiplied out in the kernel.
"""


def stride_unit(strides: list[int]) -> int:
    """The largest of 8, 4, 2, 1 that divides every stride; 1 also if 16 does, which Triton sees by itself."""
    if all(stride % 16 == 0 for stride in strides):
        return 1
    return next(unit for unit in (8, 4, 2, 1) if all(stride % unit == 0 for stride in strides))
