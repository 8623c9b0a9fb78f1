"""Sizes that the kernels of compensated rounding share with the buffers they are given; no Numba, no NumPy."""

LANES = 64  # rows of a weight that are rounded side by side, and columns of a panel
TILE = 128  # terms that are added to all rows of a panel before the next ones are read
TILE_ROWS, TILE_COLS = 4, 16
