"""TODO."""

if __name__ != "embodied_rft.agents":  # one module must have one name
    raise ImportError("import embodied_rft.agents, not agents")
