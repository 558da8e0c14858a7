"""python -m alignment_jax COMMAND ..."""

from .cli import main

main()
