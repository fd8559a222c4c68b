"""How the embedded model was made: sprites, recipe, trainer, evaluation. Not installed with the package."""
