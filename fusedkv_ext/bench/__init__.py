"""The benchmark suite of `fusedkv bench`: operations and models beside torch and beside the roof of the run.

Nothing in `import fusedkv_ext` imports this package.
"""
