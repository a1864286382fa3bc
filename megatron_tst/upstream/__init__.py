"""What this package relies on inside Megatron, and the one way in which it changes it."""
