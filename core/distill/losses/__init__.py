"""The terms of the training loss: one file each, found by its name, weighed by the spec."""
