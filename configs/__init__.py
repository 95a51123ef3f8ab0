"""TODO."""

if __name__ != "embodied_rft.configs":  # one module must have one name
    raise ImportError("import embodied_rft.configs, not configs")
