"""A run: recipe, session, rig, resume, checkpoint, logs, its folder; what reads it afterwards."""
