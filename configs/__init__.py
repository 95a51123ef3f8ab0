"""Recipes as YAML files: `erft list recipes` names them, `erft train NAME` runs one. No code lives here."""

if __name__ != "embodied_rft.configs":  # one module must have one name
    raise ImportError("import embodied_rft.configs, not configs")
