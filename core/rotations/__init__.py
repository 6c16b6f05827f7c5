"""Rotations as numbers: logarithm, exponential action, Procrustes, planes. Rows rotate: y = q W."""
