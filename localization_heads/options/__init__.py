"""Every option once: name, type, default, range and the sentence that explains it.

`kinds` says how an option is declared and checked, `groups` holds the options of the method, `surroundings` those of
what surrounds it, `experiments` those of the paper's experiments with their presets, `parts`, `shared` and `programs`
those of each program. `compose` hands all of them to Hydra and prints `--help`. Nothing here imports torch or numpy.
"""
