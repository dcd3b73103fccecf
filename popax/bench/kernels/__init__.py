"""The kernels' numbers: what the TPU compiler counts without a TPU, and what a clock says on an attached device."""
