"""cliff commands, one module a group."""
