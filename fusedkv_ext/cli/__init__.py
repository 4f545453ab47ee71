"""The subcommands of `fusedkv`: each module has `add_arguments(parser)` and `run(args) -> exit code`.

They import what they need when they run, so that `fusedkv --help` answers at once.
"""
