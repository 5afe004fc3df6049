"""What a file is, read from its head: no weight is unpacked, and PyTorch is not imported."""
