"""``python -m trimtab``, which is also what ``accelerate launch -m trimtab`` runs."""

from trimtab.cli import main

main()
