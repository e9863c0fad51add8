"""Which structures go: learning what is decided on, and deciding."""
