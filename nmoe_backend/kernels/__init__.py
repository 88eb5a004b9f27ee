"""One operation a file. Imports torch only; kernels do not import each other and nothing of this project.

`<name>_reference` is the plain-torch form: slow, obviously right, on any device. It is what a faster kernel of the same
operation is tested against. Layers reach operations through `layers/ops.py` only.

Modules named `*_gpu` and `*_sm90` need triton and are imported where the device is a GPU only.
"""
