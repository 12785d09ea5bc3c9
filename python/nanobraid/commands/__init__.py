"""The commands of the command line, one module each.

A module's docstring is the command's help. It defines ``add_arguments(parser)`` and ``run(options) -> exit code``.
"""
