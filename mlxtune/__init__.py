"""Fine-tune a small language model of your own on a laptop, and find out whether it was worth it.

Public names carry no leading underscore. The verbs are modules of this package
(`mlxtune.convert`, `mlxtune.train`, ...); the command line in `mlxtune.cli` is a thin layer over them.
"""

__version__ = "0.1.0"
