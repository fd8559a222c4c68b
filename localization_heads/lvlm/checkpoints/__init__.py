"""From a name to a loaded model: where a checkpoint lies, checks of its files, its processor."""
