"""Prompts and texts: read from files, folders, objects or the hub, and cut into batches."""
