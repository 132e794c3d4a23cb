"""Quantization methods, one file each, which all fill the same format (`packing`).

Without data: `rtn` rounds to nearest, `search` looks for scale and bias (`floats` for the scale of 4-bit floats). With
what layers read (`calibrate`, on a user's rows or the network's own, `own_text`): `imatrix` weighs the search, `gptq`
makes later inputs repair the errors of earlier ones. `dwq` learns scales and biases afterwards, `awq` is mlx-lm's
own scaling and clipping, `budget` gives each layer its bits.
"""
