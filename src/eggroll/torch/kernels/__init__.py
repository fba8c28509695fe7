"""Fast versions of what plain PyTorch operations also compute; each falls back to them where it cannot run."""
