"""For authors of plug-ins: `check_env`, `check_policy`."""
