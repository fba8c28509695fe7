"""The command line: ``eggroll tune``, ``info``, ``replay``, ``report``."""
