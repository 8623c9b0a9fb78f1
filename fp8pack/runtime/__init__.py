"""What inference code uses: packed tensors on a device."""
