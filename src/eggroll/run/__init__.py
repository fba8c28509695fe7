"""What a run leaves on disk and shows on the screen: logs, checkpoints, trackers, progress, report, replay."""

from eggroll.run.checkpoint import Checkpoint, DamagedCheckpointWarning
from eggroll.run.run_dir import RunDir

__all__ = ["Checkpoint", "DamagedCheckpointWarning", "RunDir"]
