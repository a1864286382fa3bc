"""The numerics: bags, losses, kernels and their readable twins; torch only."""
