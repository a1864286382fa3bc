"""Shows faults of the installed megatron-core; docs/host-faults.md says what each one means."""
