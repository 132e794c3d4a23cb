"""Quantization methods, one file each: `rtn` rounds to nearest."""
