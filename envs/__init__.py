"""TODO."""

if __name__ != "embodied_rft.envs":  # one module must have one name
    raise ImportError("import embodied_rft.envs, not envs")
