"""``python -m lightning_maml`` runs the command ``lightning-maml``."""

from lightning_maml.cli import main

if __name__ == "__main__":
    main()
