"""Every option once: name, type, default, range and the sentence that explains it.

`kinds` says how an option is declared and checked, `groups` holds the options of the method and its surroundings,
`experiments` those of the paper's experiments with their presets, `programs` those of each program. `compose` hands
all of them to Hydra and prints `--help`. Nothing here imports torch or numpy.
"""
