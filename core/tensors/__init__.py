"""Tensors on disk and on devices: the legend of axes, safetensors files, the data formats."""
