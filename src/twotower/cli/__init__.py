"""The `twotower` command, one file per verb; `main` finds and runs them."""
