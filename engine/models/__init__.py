"""Decoder architectures as data over one block."""
