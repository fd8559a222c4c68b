"""The training of the embedded model: sprites, recipe, trainer, evaluation. Not installed with the package."""
