"""One operation a file or a folder. Imports torch only: nothing of this project, and no other kernel but those of one
folder.

`<name>_reference` is the plain-torch form: slow, obviously right, on any device. It is what a faster kernel of the same
operation is tested against. Layers reach these through `layers/ops.py`, the kernels through `layers/hopper_ops.py` and
`layers/hopper_exchange.py`.

Modules named `*_gpu` and `*_sm90` need triton and are imported where the device is a GPU only.

Kernels of a step start while the one ahead in the stream still runs (programmatic dependent launch, `launch_pdl`). Each
calls `gdc_wait` before it reads what an earlier kernel wrote and before it writes at all: it returns when the kernel
ahead has ended, which has waited in its turn. Before it lie addresses and what never changes during a step: weights,
which must have been complete (a synchronisation, at load) before the first step. `gdc_launch_dependents`, always behind
the kernel's own wait, lets the next one start early; so that one finds complete what was launched before the kernel
ahead, and may read it before it waits (the tile table of the expert GEMMs, behind the gathering of their rows). Kernels
that fill every SM leave it out where the next one has several programs an SM: the first SM that is free would take more
than its share of them. Two kernels run beside the one ahead from begin to end and wait for it last: rdep_gpu.py.
"""
