"""Which implementation runs. XLA is the only one so far, and the default on CPU."""

from popax.kernels.stacked_lora import reference

stacked_forward = reference.forward
stacked_backward = reference.backward
