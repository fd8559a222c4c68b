"""Every option, declared once: name, type, default, range and the sentence that explains it.

`declaration` defines how an option is declared and validated. `groups` holds the options of the method, `stage_groups`
those of single stages, `experiments` those of the paper's experiments with their presets. `programs` combines these
with `shared` and `finder_mixins` into the options of each command. `compose` registers them with Hydra and makes
`--help`. Nothing here imports torch or numpy.
"""
