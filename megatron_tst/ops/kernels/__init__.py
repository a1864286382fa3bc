"""Triton kernels of the loss and the embedding: one rank's share, without collectives.

Only :mod:`.launch` can be imported where Triton is not installed; ask its ``available`` first.
"""
